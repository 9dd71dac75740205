"""What `regret.py` measured, as a table and pictures.

    python examples/regret_figures.py       # of examples/results, as far as the runs are

Read OUT/regret_runs.csv and the tables of single experiments; write OUT/regret.csv, a row for each
setting, and OUT/regret_NAME.png for each experiment; print the tables of the guides. Errors and
bands are standard errors over the seeds.

The best rate is where a parabola through the losses at three rates, half a decade apart and the
middle one the best, is lowest. The parabolas of all seeds of a setting are equally curved. How far
their vertices lie apart, in all settings of an experiment, gives the error; by Student's t the
interval has the best rate on these validation rows in 95 of 100 cases. Where the loss is no
parabola, as beside a rate at which training diverges, the vertex is off by up to a quarter of a
decade more.
"""

import collections
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tables
from matplotlib.ticker import NullFormatter
from regret import ALPHA, ALPHABET, LENGTH, OUT, OWN, PLANS, SCALE, Setting, sizes_of
from scipy import stats
from tables import Row

BITS = "capacity", "long"  # experiments in which bits are learned
SCALES = {  # ways to choose s
    "s = 32/r": lambda setting: np.isclose(setting.scale * setting.rank, ALPHA),
    "s = 2": lambda setting: setting.scale == SCALE,
}

# ---- the best rate ------------------------------------------------------------------------------


def vertices(losses: np.ndarray) -> np.ndarray:
    """Where parabolas of equal curvature are lowest, in steps from the middle of three rates.

    Args:
        losses: of n seeds at the three rates, ``(n, 3)``.

    Returns:
        A place for each seed, ``(n,)``; NaN if the loss has no lowest place, or, in the mean, none
        among the rates.
    """
    low, middle, high = losses.T
    curvature = (low - 2 * middle + high).mean()
    found = (low - high) / 2 / (curvature if curvature > 0 else np.nan)
    return np.where(abs(found.mean()) <= 1, found, np.nan)


def find_vertices(runs: Sequence[Row]) -> np.ndarray:
    """The decimal logarithm of the best rate by each seed that ran at all three rates.

    These are the three that all seeds ran at, whichever is the best by their mean; of one seed, the
    best and those beside it.
    """
    seeds = collections.Counter(row["rate"] for row in runs)
    shared = sorted(rate for rate, n in seeds.items() if n == max(2, *seeds.values()))
    middle = shared[1] if len(shared) == 3 else tables.best(runs, "validation", 1)[0]["rate"]
    center = round(2 * np.log10(middle))
    losses = collections.defaultdict(lambda: np.full(3, np.nan))
    for row in runs:
        i = round(2 * np.log10(row["rate"])) - center
        if abs(i) <= 1:
            losses[row["seed"]][i + 1] = row["validation"]
    whole = [x for x in losses.values() if np.isfinite(x).all()]
    return (center + vertices(np.array(whole))) / 2 if whole else np.zeros(0)


def find_error(each: Iterable[np.ndarray]) -> float:
    """By settings' vertices, how far off that of one seed is at most, in 95 of 100 cases."""
    found = [x for x in each if len(x) > 1 and np.isfinite(x).all()]
    degrees = sum(len(x) - 1 for x in found)
    squares = sum(((x - x.mean()) ** 2).sum() for x in found)
    return float((squares / degrees) ** 0.5 * stats.t.ppf(0.975, degrees)) if degrees else np.nan


# ---- the table ----------------------------------------------------------------------------------


def bits(task: str) -> float:
    """How many bits the random strings of a task have."""
    return int(task.partition("-")[2]) * LENGTH * float(np.log2(ALPHABET))


def learned(row: Row) -> float:
    """How many bits of random strings a run has learned."""
    return bits(row["task"]) * (1 - row["held_out"] / np.log(ALPHABET))


def setting_of(row: Row) -> Setting:
    """The setting of a run, or of a row of the table."""
    return Setting(*(row[name] for name in Setting._fields))


def group(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """The runs of each setting, with bits, right sums or a loss.

    They are in the order of the plans. Settings that are planned no more are last.
    """
    found, scores = collections.defaultdict(list), {"reinforce": "sampled_after"}
    for row in rows:
        name = row["experiment"]
        score = learned(row) if name in BITS else row[scores.get(name, "held_out")]
        found[setting_of(row)].append(row | {"score": score})
    planned = [x for settings, _ in PLANS.values() for x in settings if x in found]
    return {x: found[x] for x in (*planned, *found)}


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting: its best rate, also over full fine-tuning's, and its score."""
    groups, table = group(rows), []
    at = {setting: find_vertices(runs) for setting, runs in groups.items()}
    for setting, runs in groups.items():
        error = find_error(x for other, x in at.items() if other.experiment == setting.experiment)
        full = at.get(setting._replace(rank=0, scale=1.0, method="lora")) if setting.rank else None
        about, mean, standard_error = tables.best(runs, "score", 1)
        row = setting._asdict() | {"trained": runs[0]["trained"], "runs": len(runs), **about}
        row |= _interval("best_rate", error, at[setting])
        row |= _interval("of_full", error, at[setting], np.zeros(0) if full is None else full)
        numbers = {"score": f"{mean:.5g}", "standard_error": f"{standard_error:.2g}"}
        table.append(row | {name: float(x) for name, x in numbers.items()})
    return table


def _interval(name: str, error: float, *each: np.ndarray) -> Row:
    """Ten to the mean of the first, less that of the second, with its interval."""
    names = name, f"{name}_low", f"{name}_high"
    if not all(map(len, each)):
        return dict.fromkeys(names, np.nan)
    place = each[0].mean() - sum(x.mean() for x in each[1:])
    error *= sum(1 / len(x) for x in each) ** 0.5
    powers = (float(f"{10**x:.3g}") for x in (place, place - error, place + error))
    return dict(zip(names, powers, strict=True))


def trends(rows: Sequence[Row]) -> str:
    """Sentences: what a larger rank or batch does to the best rate, with its interval."""
    found = []
    for experiment in ("rates", "batches", "sentences"):
        own = ((x, runs) for x, runs in group(rows).items() if x.experiment == experiment)
        at = {x: find_vertices(runs) for x, runs in own}
        at = {x: each for x, each in at.items() if len(each) and np.isfinite(each).all()}
        lines = [
            (f"with {name}, ten times the rank", "rank", 10, lambda x, has=has: x.rank and has(x))
            for name, has in SCALES.items()
        ]
        lines += [("four times the batch", "batch", 4, lambda x: not is_fixed(x))]
        for words, name, step, is_in in lines:
            shown = {x: each for x, each in at.items() if is_in(x)}
            if len({getattr(x, name) for x in shown}) > 2:
                about = f"On {next(iter(shown)).task}, {words} takes"
                found.append(f"{about} {_factor(shown, name, step)} times the learning rate.\n")
    return "".join(found)


def _factor(at: dict[Setting, np.ndarray], name: str, step: float) -> str:
    """By how much the best rate grows with a field of settings that differ in no other; see above.

    The logarithms lie on parallel lines, one for each value of the other fields. One seed gives no
    interval.
    """
    lines = collections.defaultdict(list)
    for setting, each in at.items():
        other = setting._replace(**{name: 0, "scale": 0.0})
        lines[other].append((np.log10(getattr(setting, name)), each.mean()))
    x, y = np.concatenate([np.array(line) - np.mean(line, 0) for line in lines.values()]).T
    error = find_error(at.values()) / min(map(len, at.values())) ** 0.5 / (x @ x) ** 0.5
    power, least, most = (step ** (x @ y / (x @ x) + e) for e in (0, -error, error))
    return f"{power:.2f} ({least:.2f} to {most:.2f})".removesuffix(" (nan to nan)")


def markdown(rows: Sequence[Row], experiment: str) -> str:
    """The table of an experiment as the guide has it."""
    make = {"reinforce": reward_lines, "forgetting": forgotten_lines} | dict.fromkeys(
        BITS, bit_lines
    )
    make = make.get(experiment, loss_lines)
    rows = [row for row in rows if row["experiment"] == experiment]
    return "".join(f"| {' | '.join(line)} |\n" for line in make(rows))


def loss_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells: the best rates, and the losses there; of what varies, and of what is known."""
    table, lines = sorted(summary(rows), key=lambda row: _order(setting_of(row))), []
    columns = "task", "layers", "batch", "method"
    varies = {name for name in columns if len({row[name] for row in table}) > 1}
    for row in table:
        method = METHODS[row["method"]] if row["rank"] else ""
        names = {"task": row["task"], "rank": label(row), "layers": row["layers"], "method": method}
        cells = {"": ", ".join(x for k, x in names.items() if x and k in varies | {"rank"})}
        cells["s"] = f"{row['scale']:.3g}" if row["rank"] else ""
        cells["batch"] = str(row["batch"]) if "batch" in varies else ""
        cells |= {"best rate": _cell(row, "best_rate"), "÷ full's": _cell(row, "of_full")}
        lines.append(cells | {"held-out loss": _loss(row["score"], row["standard_error"])})
    names = [name for name in lines[0] if any(cells[name] for cells in lines)] if lines else []
    return [names, len(names) * ["---"], *([cells[name] for name in names] for cells in lines)]


def bit_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells: how many bits of how many strings are learned, and in parentheses by a parameter."""
    table = sorted(summary(rows), key=lambda row: _order(setting_of(row)))
    tasks = list(dict.fromkeys(row["task"] for row in table))
    sizes = (f"{task.partition('-')[2]}: {bits(task):,.0f} bits" for task in tasks)
    names = ["strings", "parameters", *sizes]
    lines = [names, len(names) * ["---"]]
    for rank in sorted({row["rank"] for row in table}, key=lambda rank: rank or np.inf):
        own = {row["task"]: row for row in table if row["rank"] == rank}
        count = next(iter(own.values()))["trained"]
        each = {x: f"{row['score']:,.0f} ({row['score'] / count:.2f})" for x, row in own.items()}
        lines.append([label({"rank": rank}), f"{count:,}", *(each.get(task, "") for task in tasks)])
    return lines


def is_fixed(x: Setting) -> bool:
    """Whether s is not 32/r."""
    return x.rank > 0 and not SCALES["s = 32/r"](x)


def _order(x: Setting) -> tuple[Any, ...]:
    """By task, batch and layers; s = 32/r before s = 2; by rank, and full fine-tuning last."""
    size = sizes_of(x.task)[::-1] if x.task.startswith("gpt") else ()
    by_method = list(METHODS).index(x.method)
    return (
        len(x.task) * (not size),
        *size,
        x.task,
        x.batch,
        x.layers,
        is_fixed(x),
        x.rank or np.inf,
        by_method,
    )


def reward_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells: how many held-out sums are right, and what becomes of rewards at the next rate."""
    names, kinds = ("at the next rate", "reward there, highest to lowest"), ("sampled", "greedy")
    lines = [["", "best rate", *(f"right, {x}" for x in kinds), *names], 6 * ["---"]]
    for row in rows[:1]:
        lines.append(["before", "", *(f"{row[f'{x}_before']:.0%}" for x in kinds), "", ""])
    for setting, runs in sorted(group(rows).items(), key=lambda item: _order(item[0])):
        rate = tables.best(runs, "score", 1)[0]["rate"]
        each = (tables.best(runs, f"{x}_after", 1)[1:] for x in kinds)
        cells = [f"{x:.0%} ± {error:.0%}".removesuffix(" ± nan%") for x, error in each]
        above = [row for row in runs if round(2 * np.log10(row["rate"] / rate)) == 1]
        if above:
            each = (np.array([*rewards(row).values()]) for row in above)
            falls = ((x.max(), x[x.argmax() :].min()) for x in each)
            high, low = max(falls, key=lambda x: x[0] - x[1])
            cells += [f"{np.mean([row['score'] for row in above]):.0%}", f"{high:.2f} to {low:.2f}"]
        lines.append([name_of(setting), _scientific(rate), *cells, *(4 - len(cells)) * [""]])
    return lines


def rewards(row: Row) -> dict[int, float]:
    """From the fourth step of a run on, the mean reward of the last eight, or of all so far."""
    each = list(curve(row).values())
    return {i: float(np.mean(each[max(i - 8, 0) : i])) for i in range(4, len(each) + 1)}


def _cell(row: Row, name: str) -> str:
    """A rate as 8.7e-4, or a ratio of rates; and its interval."""
    found, *ends = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    form = _scientific if name == "best_rate" else "{:.2g}".format
    interval = "" if np.isnan(ends).any() else f" ({' to '.join(map(form, ends))})"
    return "" if np.isnan(found) else form(found) + interval


def _scientific(x: float) -> str:
    return f"{x:.1e}".replace("e-0", "e-")


METHODS = {
    "lora": "Adam",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "lora_plus": "LoRA+",
    "preconditioned": "preconditioned",
    "muon": "Muon",
    "free": "no KL",
    "allocated": "ranks by the gradient",
}


def label(row: Row) -> str:
    """The rank in words."""
    return f"r = {row['rank']}" if row["rank"] else "full"


# ---- the pictures -------------------------------------------------------------------------------

AXES = {
    "first": ("step", "training loss"),
    "capacity": ("bits in the strings", "bits learned"),
    "long": ("trained parameters", "bits learned"),
    "parts": ("learning rate", "validation loss"),
    "forgetting": ("loss on the new text", "loss on the text of before"),
    "rates": ("learning rate", "validation loss"),
    "layers": ("learning rate", "validation loss"),
    "batches": ("batch, at equally many examples", "held-out loss"),
    "sentences": ("batch, at equally many examples", "held-out loss"),
    "third": ("learning rate", "validation loss"),
    "optimizers": ("rank", "best learning rate"),
}
PANELS = {  # those with axes of their own
    "at depth 4": ("width", "best learning rate"),
    "at width 128": ("depth", "best learning rate"),
    "at the best rate": ("step", "reward, mean of 8 steps"),
    "held-out sums": ("learning rate", "share right"),
}
TICKED = "rank", "width", "depth", AXES["batches"][0]  # axes on which each x has its label
Panels = dict[str, dict[str, dict[float, list[float]]]]  # of lines of x to the y of each seed


def collect(experiment: str, rows: Sequence[Row]) -> Panels:
    """What the picture of an experiment shows.

    The first steps are those of the seeds that all settings have. What a seed has more than others
    at the rates that all have is taken from its losses.
    """
    found: Panels = collections.defaultdict(lambda: collections.defaultdict(dict))
    groups = {x: runs for x, runs in group(rows).items() if x.experiment == experiment}
    each = [{row["seed"] for row in runs} for runs in groups.values()]
    for setting, runs in groups.items():
        line, panels = name_of(setting), [""]
        if experiment in ("first", "rates"):
            panels = [name for name, has in SCALES.items() if has(setting) or not setting.rank]
        elif experiment in ("layers", "parts"):
            line, panels = setting.layers, [setting.task]
        elif experiment == "long":
            line = "LoRA" if setting.rank else "full"
        best, more = tables.best(runs, "score", 1)[0]["rate"], _levels(runs)
        if experiment == "forgetting":
            for new, old in learned_and_forgotten(runs):
                found[setting.task][name_of(setting)][float(new.mean())] = old.tolist()
            continue
        if experiment in RATED:
            places = find_vertices(runs)
            for panel, name, x in RATED[experiment](setting) if len(places) else ():
                found[panel][name][x] = list(10**places)
            continue
        for row in runs:
            is_best = row["rate"] == best
            points = {row["rate"]: row["validation"] - more[row["seed"]]}
            if experiment == "first":
                points = curve(row) if row["seed"] in set.intersection(*each) else {}
            elif experiment in SCORED:
                points = {SCORED[experiment](row): row["score"]} if is_best else {}
            shown = dict.fromkeys(panels, points)
            if experiment == "reinforce":
                points = rewards(row) if is_best else {}
                shown = {"at the best rate": points, "held-out sums": {row["rate"]: row["score"]}}
            for panel, points in shown.items():
                lines = found[panel]
                for x, y in points.items():
                    lines[line].setdefault(x, []).append(y)
    return found


def name_of(setting: Setting) -> str:
    """The rank in words, and the method if it is not LoRA with Adam."""
    more = f", {METHODS[setting.method]}" if setting.method != "lora" else ""
    return label(setting._asdict()) + more


def learned_and_forgotten(runs: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The losses of all seeds on the new text and on that of before, from the best rate down."""
    best, at = tables.best(runs, "score", 1)[0]["rate"], collections.defaultdict(list)
    for row in sorted(runs, key=lambda row: (-row["rate"], row["seed"])):
        at[row["rate"]].append((row["held_out"], row["old_after"]))
    return [
        tuple(np.array(each).T)
        for rate, each in at.items()
        if rate <= best and len(each) == len(at[best])
    ]


def forgotten_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells: both losses at the best rate, and that of before where all learn as much as the worst.

    How much a run learns depends on its rate.
    """
    names = "new text", "text of before", "of before, at equal new loss", "intruders"
    lines, groups = [["", *names], 5 * ["---"]], group(rows)
    settings = sorted(groups, key=_order)
    for task in dict.fromkeys(setting.task for setting in settings):
        own = {x: learned_and_forgotten(groups[x]) for x in settings if x.task == task}
        shared = max(points[0][0].mean() for points in own.values())
        first = groups[next(iter(own))][0]
        before = (f"{first[name]:.3f}" for name in ("new_before", "old_before"))
        lines.append([f"{task}, before", *before, f"at {shared:.3f}", ""])
        for setting, points in own.items():
            new, old = np.array(points).transpose(1, 2, 0)  # of seeds, by rate
            there = [_old_loss(shared, x, y) for x, y in zip(new, old, strict=True)]
            losses = (_loss(*tables.mean(each)) for each in (new[:, 0], old[:, 0], there))
            intruders = tables.best(groups[setting], "intruders", 1)[1]
            lines.append([f"{task}, {name_of(setting)}", *losses, f"{intruders:.2f}"])
    return lines


def _old_loss(loss: float, new: np.ndarray, old: np.ndarray) -> float:
    """The loss on the text of before on the line through runs, at a loss on the new one."""
    order = np.argsort(new)
    return float(np.interp(loss, new[order], old[order], right=np.nan))


def _loss(mean: float, error: float) -> str:
    """A loss and its standard error, as far as they are known."""
    return "" if np.isnan(mean) else f"{mean:.3f} ± {error:.3f}".removesuffix(" ± nan")


def _by_size(setting: Setting) -> Iterator[tuple[str, str, float]]:
    """Panel, line and x of a setting of `widths`."""
    width, depth = sizes_of(setting.task)
    line = name_of(setting)
    if depth == 4:
        yield "at depth 4", line, width
    if width == 128:
        yield "at width 128", line, depth


SCORED: dict[str, Callable[[Row], float]] = {  # of which scores at the best rate are shown: x
    "batches": lambda row: row["batch"],
    "sentences": lambda row: row["batch"],
    "capacity": lambda row: bits(row["task"]),
    "long": lambda row: row["trained"],
}
RATED = {  # experiments of which best rates are shown: panel, line and x of a setting
    "widths": _by_size,
    "optimizers": lambda setting: [(setting.task, METHODS[setting.method], setting.rank)],
}


def curve(row: Row) -> dict[int, float]:
    """The loss or reward of each step."""
    found = {k.partition("_")[::2]: x for k, x in row.items()}
    return {int(i): x for (name, i), x in found.items() if name in ("loss", "reward") and i}


def _levels(runs: Sequence[Row]) -> dict[int, float]:
    """How much more loss each seed has than their mean, at the rates that most seeds have."""
    count = collections.Counter(row["rate"] for row in runs)
    losses = collections.defaultdict(list)
    for row in runs:
        if count[row["rate"]] == max(count.values()):
            losses[row["seed"]].append(row["validation"])
    means = {seed: np.nanmean(each) for seed, each in losses.items()}
    return {seed: float(x - np.mean(list(means.values()))) for seed, x in means.items()}


def _place(name: str) -> tuple[bool, int, str]:
    return name == "full", len(name), name


def draw(path: pathlib.Path, experiment: str, panels: Panels) -> None:
    """Panels below each other, as wide as a phone; full fine-tuning is dashed."""
    size = 4, 0.3 + 2.8 * len(panels)
    shared = experiment in ("first", "rates")  # axes, as these panels are to be compared
    how = {"squeeze": False, "sharex": shared, "sharey": shared, "layout": "constrained"}
    figure, axes = plt.subplots(len(panels), figsize=size, **how)
    names = sorted({name for lines in panels.values() for name in lines}, key=_place)
    for axis, (title, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for name in sorted(lines, key=_place):
            seeds = [np.array(each) for _, each in sorted(lines[name].items())]
            x, y = np.array(sorted(lines[name])), np.array([each.mean() for each in seeds])
            if experiment in BITS:  # fewer than none have no place on this axis
                y = np.where(y > 0, y, np.nan)
            error = np.array([each.std() / max(len(each) - 1, 1) ** 0.5 for each in seeds])
            is_full = name == "full"
            i = names.index(name)
            color = "black" if is_full else plt.get_cmap("viridis")(0.9 * i / len(names))
            style = f"{'os^DvX<>'[i]}{'--' if is_full else '-'}"
            every = 1 + len(x) // 12
            axis.plot(x, y, style, color=color, markersize=4, markevery=every, label=name)
            axis.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0)
        xlabel, ylabel = PANELS.get(title) or AXES[experiment]
        if ylabel == "validation loss":  # what diverges is not shown
            losses = np.concatenate([line.get_ydata() for line in axis.lines])
            low, high = np.nanmin(losses), np.nanmax(losses)
            axis.set_ylim(low - 0.05, min(low + 0.8, high + 0.05))
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.tick_params(labelbottom=True)  # of shared ones too
        is_linear = xlabel in ("step", AXES["forgetting"][0])
        axis.set_xscale("linear" if is_linear else "log")
        if xlabel in TICKED:
            ticks = sorted({x for points in lines.values() for x in points})
            axis.set_xticks(ticks, ticks)
            axis.minorticks_off()
        axis.set_yscale("log" if experiment in (*BITS, *RATED) else "linear")
        for side in (axis.xaxis, axis.yaxis):  # labels between powers of ten would overlap
            side.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def read(out: pathlib.Path) -> list[Row]:
    """All runs, as far as they are."""
    return [row for name in ("runs", *OWN) for row in tables.read(out / f"regret_{name}.csv")]


def write(out: pathlib.Path) -> str:
    """Writes the table and the pictures, and returns the tables of the guides.

    Raises:
        ValueError: nothing has run.
    """
    if not (rows := read(out)):
        raise ValueError(f"`{out}` has no regret_runs.csv. Run regret.py first.")
    tables.write(out / "regret.csv", summary(rows))
    for name in PLANS:
        if panels := collect(name, rows):
            draw(out / f"regret_{name}.png", name, panels)
    return "\n".join([*(markdown(rows, name) for name in PLANS), trends(rows)])


if __name__ == "__main__":
    print(write(pathlib.Path(sys.argv[1]) if sys.argv[1:] else OUT), end="")
