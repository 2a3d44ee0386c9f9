"""The runtime type checker of the tests. Like Python's type checkers, it accepts an int for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
