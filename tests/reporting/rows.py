"""Results for the tests of reporting, as a run writes them: RoPE trained on 256 tokens, evaluated on up to 1024."""

from posenc_jax.results import Result

LENGTHS = (128, 256, 512, 1024)
BITS = {
    "none": (1.85, 1.84, 2.0, 2.32),
    "ntk": (1.85, 1.85, 1.9, 2.16),
    "linear": (1.9, 1.88, 2.98, 7.9),
}


def row(
    metric: str = "prefix_bits_per_byte",
    length: int = 512,
    value: float | None = 2.0,
    half_width: float = 0.01,
    *,
    encoding: str = "rope",
    scaling: str = "none",
    seed: int = 0,
    train_length: int = 256,
) -> Result:
    low, high = (None, None) if value is None else (value - half_width, value + half_width)
    return Result("study", encoding, scaling, seed, train_length, length, metric, value, low, high, 64 * length)


def results() -> list[Result]:
    rows = []
    for scaling, bits in BITS.items():
        for length, value in zip(LENGTHS, bits, strict=True):
            rows.append(row("prefix_bits_per_byte", length, value, scaling=scaling))
            rows.append(row("tail_bits_per_byte", length, value - 0.1, scaling=scaling))
            rows.append(row("prefix_perplexity", length, 2**value, scaling=scaling))
            rows.append(row("tail_perplexity", length, 2**value / 1.1, scaling=scaling))
            rows.append(row("long_perplexity", length, 2**value / 2, scaling=scaling))
            if length > 256:
                rows.append(row("context_gain_bits_per_byte", length, 1.905 - value, scaling=scaling))
            if scaling != "none":
                unscaled = BITS["none"][LENGTHS.index(length)]
                rows.append(row("prefix_change_bits_per_byte", length, value - unscaled, scaling=scaling))
        rows += [row("copy_gain_bits_per_byte", n, 3 - bits[2] - n / 1024, scaling=scaling) for n in (64, 512)]
        rows += [row("by_position_bits_per_byte", 64 * i, bits[i // 4], scaling=scaling) for i in range(1, 16)]
    return rows


def learned_results() -> list[Result]:
    """Results of learned positions, with a table of 512 positions, and of NoPE."""
    values = {"none": (1.9, 1.9, 1.92, 2.5), "learned": (1.85, 1.85, 2.6, None)}
    return [
        row("prefix_bits_per_byte", length, value, encoding=encoding)
        for encoding, bits in values.items()
        for length, value in zip(LENGTHS, bits, strict=True)
    ]
