"""The runtime type checker of the tests: as Python's type checkers do, it takes an int for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
