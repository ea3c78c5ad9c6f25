"""On a process's path this takes the network from it and from its children; local pipes stay."""

import socket

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _refuse(*words: object, **_: object) -> None:
    raise AssertionError(f"a network call: {words[:2]}")


def _local_only(real):
    def connect(self, address):
        return real(self, address) if self.family == socket.AF_UNIX else _refuse(address)

    return connect


socket.socket.connect = _local_only(_connect)
socket.socket.connect_ex = _local_only(_connect_ex)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = _refuse
