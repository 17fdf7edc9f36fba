"""What an operator does to replicas from outside: ask them, examine their folders, archive, restore, audit.

    asking.py             one question to one replica over its own port, with everything that can go wrong named
    reports.py            what a status report says, read as what it is: somebody else's word
    health.py             one word on one replica
    findings.py           what a doctor finds: where, how bad, and what to do
    doctor_folder.py      examines a replica's folder; doctor_log.py its log; doctor_network.py its ports and its peers
    dump.py               an archive for a bug report, without any key
    backup.py             an archive to restore from, without the log; restoring.py puts it back and rolls nothing back
    audit.py              verifies all that a folder holds of every log

The commands in `replica.cli` print what these return.
"""
