"""Relays standard input and output to a Unix socket: how tpm2-tools reach a software TPM (their "cmd" transport)."""

import os
import socket
import sys
import threading


def main(path):
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)

        def answers():
            while data := link.recv(4096):
                os.write(1, data)

        threading.Thread(target=answers, daemon=True).start()
        while data := os.read(0, 4096):
            link.sendall(data)


if __name__ == "__main__":
    main(sys.argv[1])
