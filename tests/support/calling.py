"""Calls of the replica's program within the test's own process."""

import json

import pytest

from replica.cli.main import main


def json_caller(capsys):
    """A function that calls the program with `-o json`; it returns exit code and result, and nothing is said beside."""

    def call_program(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*(str(argument) for argument in arguments), "-o", "json"])
        out, err = capsys.readouterr()
        assert err == ""
        return ended.value.code, json.loads(out)

    return call_program
