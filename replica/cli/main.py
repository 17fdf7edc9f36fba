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

from replica.cli.options import PROGRAM
from replica.cluster.strict_toml import ConfigError
from trustlog.cli.build import version_option
from trustlog.cli.completion import answer_shell, completion_command
from trustlog.cli.contract import CommandError, Exit, example, run
from trustlog.cli.lazy import LazyCommands


class _Commands(click.Group):
    """Turns configuration errors into the contract's: their texts already say what to do."""

    def invoke(self, ctx: click.Context) -> object:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise CommandError(str(error), exit_code=Exit.USAGE, code="configuration") from error


_COMMANDS = LazyCommands(
    {
        "init": "replica.cli.provisioning:init_command",
        "keygen": "replica.cli.provisioning:keygen_command",
        "client-key": "replica.cli.provisioning:client_key_command",
        "keys": "replica.cli.keys:keys_commands",
        "assemble": "replica.cli.provisioning:assemble_command",
        "run": "replica.cli.running:run_command",
        "dev": "replica.cli.running:dev_command",
        "close": "replica.cli.running:close_command",
        "config": "replica.cli.settings:config_commands",
        "status": "replica.cli.status:status_command",
        "health": "replica.cli.status:health_command",
        "doctor": "replica.cli.doctor:doctor_command",
        "audit": "replica.cli.audit:audit_command",
        "backup": "replica.cli.backup:backup_command",
        "restore": "replica.cli.backup:restore_command",
        "refound": "replica.cli.refound:refound_command",
        "debug": "replica.cli.debug:debug_commands",
        "inspect": "replica.cli.inspect:inspect_command",
        "evidence": "replica.cli.evidence:evidence_commands",
        "probe": "replica.cli.probe:probe_command",
        "member": "replica.cli.member:member_commands",
        "clients": "replica.cli.clients:clients_commands",
        "application": "replica.cli.application:application_commands",
        "lab": "replica.lab.command:lab_commands",
        "sim": "replica.sim.command:sim_command",
    }
)


@click.group(
    cls=_Commands,
    commands=_COMMANDS,
    epilog=example("trustlog-replica dev"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@version_option
def cli() -> None:
    """Make clusters of 2f + 1 replicas, and run them."""


cli.add_command(completion_command(cli, PROGRAM))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    answer_shell(cli, PROGRAM)
    run(cli, argv, PROGRAM)


if __name__ == "__main__":
    main()
