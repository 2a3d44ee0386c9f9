"""The table of tasks. To add one: a class in a file of this folder, and a row here.

jax is imported when the first task is looked up, not before.
"""

from typing import TYPE_CHECKING, Any

from posenc_jax import registry

if TYPE_CHECKING:
    from posenc_jax.tasks.base import Task

TABLE = {  # name: file and class
    "copy": "copying.Copy",
    "repeat_copy": "copying.RepeatCopy",
    "unique_copy": "copying.UniqueCopy",
    "sort": "sorting.Sort",
    "parity": "parity.Parity",
    "flip_flop": "flip_flop.FlipFlop",
    "mqar": "recall.MQAR",
    "mqrar": "recall.MQRAR",
    "indirect_indexing": "indexing.IndirectIndexing",
    "permutation_words": "permutations.PermutationWords",
    "addition": "addition.Addition",
    "even_pairs": "regular.EvenPairs",
    "cycle_navigation": "regular.CycleNavigation",
    "modular_arithmetic": "expressions.ModularArithmetic",
    "modular_arithmetic_brackets": "expressions.ModularArithmeticBrackets",
    "solve_equation": "expressions.SolveEquation",
    "stack_manipulation": "stacks.StackManipulation",
    "reverse_string": "strings.ReverseString",
    "duplicate_string": "strings.DuplicateString",
    "missing_duplicate": "strings.MissingDuplicate",
    "odds_first": "strings.OddsFirst",
    "bucket_sort": "strings.BucketSort",
    "binary_addition": "binary.BinaryAddition",
    "binary_multiplication": "binary.BinaryMultiplication",
    "compute_sqrt": "binary.ComputeSqrt",
}


def names() -> tuple[str, ...]:
    """The names that `config.task.name` takes."""
    return tuple(TABLE)


def load(name: Any, field: str = "task") -> "type[Task]":
    """The class of one task; its settings are the fields of its `Config`.

    Raises ConfigError, naming `field`, for a name that is not in the table.
    """
    return registry.find(TABLE, __name__, name, field)
