"""Numbers and genotypes as the report prints them."""

import json

from neuroexapt.core.genotypes import AnyGenotype


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    return f"{100 * difference:+.2f}".replace("-", "−")


def large(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def rate(per_second: float) -> str:
    return f"{per_second:.3g}" if per_second < 100 else f"{per_second:,.0f}"


def duration(seconds: float) -> str:
    if round(seconds) < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def memory(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def genotype_json(genotype: AnyGenotype) -> str:
    """JSON with a line for each field, as `--genotype` reads it from a file."""
    fields = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in genotype.to_dict().items()]
    return "{\n" + ",\n".join(fields) + "\n}"


FILTERS = {
    function.__name__: function
    for function in (percent, points, large, rate, duration, memory, genotype_json)
}
