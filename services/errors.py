"""What can go wrong with a service.

    ServiceError
    +-- NotSetUp     Java or the jars are missing                       exit code 6
    +-- PortTaken    somebody else listens where a daemon would         exit code 3
    +-- DaemonDied   a daemon ended while it was starting               exit code 4
    +-- NoAnswer     a daemon runs, but does not answer in time         exit code 5

Each message says what, where, and what to do.
"""


class ServiceError(Exception):
    exit_code = 1


class NotSetUp(ServiceError):
    exit_code = 6


class PortTaken(ServiceError):
    exit_code = 3


class DaemonDied(ServiceError):
    exit_code = 4


class NoAnswer(ServiceError):
    exit_code = 5
