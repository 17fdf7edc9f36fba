"""`trustlog-replica`: makes clusters and runs replicas, under the contract of `trustlog.cli.contract`.

provisioning.py   init, keygen, client-key, assemble; keys.py: keys passphrase
member.py         member list, replace, move, add, remove
clients.py        clients list, mode, allow, revoke
application.py    application show, activate
running.py        run, dev (with dev.py), close
settings.py       config check, and settings as options
status.py         status, health; probe.py: probe, of a container's HTTP port or log
doctor.py         doctor
audit.py          audit
backup.py         backup, restore; refound.py: refound
debug.py          debug dump
inspect.py, evidence.py   what logs say, and what proves a replica faulty
replica.sim.command       the simulator; replica.lab.command: the lecture's scenarios, and their page
"""

from collections.abc import Sequence
from typing import NoReturn

import click

from replica.cli.application import application_commands
from replica.cli.audit import audit_command
from replica.cli.backup import backup_command, restore_command
from replica.cli.clients import clients_commands
from replica.cli.debug import debug_commands
from replica.cli.doctor import doctor_command
from replica.cli.evidence import evidence_commands
from replica.cli.inspect import inspect_command
from replica.cli.keys import keys_commands
from replica.cli.member import member_commands
from replica.cli.options import PROGRAM
from replica.cli.probe import probe_command
from replica.cli.provisioning import assemble_command, client_key_command, init_command, keygen_command
from replica.cli.refound import refound_command
from replica.cli.running import close_command, dev_command, run_command
from replica.cli.settings import config_commands
from replica.cli.status import health_command, status_command
from replica.cluster.strict_toml import ConfigError
from replica.lab.command import lab_commands
from replica.sim.command import sim_command
from trustlog.cli.build import version_option
from trustlog.cli.completion import answer_shell, completion_command
from trustlog.cli.contract import CommandError, Exit, example, run


class _Commands(click.Group):
    """Turns configuration errors into the contract's: their texts already say what to do."""

    def invoke(self, ctx: click.Context) -> object:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise CommandError(str(error), exit_code=Exit.USAGE, code="configuration") from error


@click.group(
    cls=_Commands,
    epilog=example("trustlog-replica dev"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@version_option
def cli() -> None:
    """Make clusters of 2f + 1 replicas, and run them."""


for _command in (
    init_command,
    keygen_command,
    client_key_command,
    keys_commands,
    assemble_command,
    run_command,
    dev_command,
    close_command,
    config_commands,
    status_command,
    health_command,
    doctor_command,
    audit_command,
    backup_command,
    restore_command,
    refound_command,
    debug_commands,
    inspect_command,
    evidence_commands,
    probe_command,
    member_commands,
    clients_commands,
    application_commands,
    lab_commands,
    sim_command,
):
    cli.add_command(_command)
cli.add_command(completion_command(cli, PROGRAM))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    answer_shell(cli, PROGRAM)
    run(cli, argv, PROGRAM)


if __name__ == "__main__":
    main()
