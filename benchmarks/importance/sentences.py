"""What the figures say, in words that they choose: nothing is said that they do not bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.importance.grid import ESTIMATORS, REFERENCE
from benchmarks.importance.names import listed

Figures = Mapping[str, Any]
_CHEAP = tuple(name for name in ESTIMATORS if name not in (REFERENCE, "random"))
# A rank correlation that is called one, and a change that is called a change.
_STRONG, _WEAK = 0.6, 0.3


def agreement(figures: Figures) -> list[str]:
    """Who ranks heads as leave-one-out does, and how far that can be told."""
    overall = figures["overall"]
    known = [name for name in _CHEAP if overall[name]["all"]]
    found = []
    if known:
        known.sort(key=lambda name: -overall[name]["all"]["median"])
        first = overall[known[0]]["all"]
        text = (
            f"`{known[0]}` ranks heads most like `{REFERENCE}`: rank correlation "
            f"{first['median']:.2f}, the median over {_cases(first)}"
        )
        text += "".join(f"; `{n}` {overall[n]['all']['median']:.2f}" for n in known[1:])
        if overall["random"]["all"]:
            text += f"; `random` {overall['random']['all']['median']:.2f}"
        found.append(f"{text}.")
    for name in known:
        within, over_all = overall[name]["within"], overall[name]["all"]["median"]
        if within and within["median"] - over_all >= _WEAK:
            found.append(
                f"Within a layer `{name}` comes to {within['median']:.2f}, over all layers to "
                f"{over_all:.2f}: its scores of different layers do not compare."
            )
    again = overall[REFERENCE]["again"]
    if again:
        found.append(
            f"On other windows `{REFERENCE}` itself comes to {again['median']:.2f}: no agreement "
            "above that can be asked for."
        )
    return found


def cost(figures: Figures) -> list[str]:
    overall = figures["overall"]
    known = [name for name in ESTIMATORS if overall[name]["cost"] and name != "random"]
    if not known:
        return []
    known.sort(key=lambda name: overall[name]["cost"]["median"])
    each = [f"`{name}` {overall[name]['cost']['median']:.1f}" for name in known]
    return [f"In forward passes over the same text, medians over cases: {listed(each)}."]


def losses(figures: Figures, run: str, title: str) -> list[str]:
    """Whose choice of heads lost least, one by one and on average."""
    wins, overall = figures["wins"][run], figures["overall"]
    if not wins["of"]:
        return []
    order = sorted(ESTIMATORS, key=lambda name: -wins["estimators"][name])
    each = [f"`{name}` ({wins['estimators'][name]})" for name in order]
    found = [
        f"{title}: at {wins['of']} points (a case and a share each) the least was lost by the "
        f"choice of {', '.join(each)}; a tie counts for all who share it."
    ]
    known = [name for name in ESTIMATORS if overall[name][run] and name != "random"]
    if known:
        known.sort(key=lambda name: overall[name][run]["median"])
        each = [f"`{name}` {overall[name][run]['median']:.2f}" for name in known]
        of = _cases(overall[known[0]][run])
        found.append(f"Mean gap as a share of `random`'s, the median over {of}: {listed(each)}.")
        worse = [name for name in known if overall[name][run]["median"] >= 1]
        if worse:
            names = listed([f"`{name}`" for name in worse])
            found.append(f"That of {names} is no better than chance.")
    return found


def healing(figures: Figures) -> list[str]:
    """What healing takes away, and whether the choice still matters after it."""
    overall = figures["overall"]
    known = [name for name in ESTIMATORS if overall[name]["left"]]
    if not known:
        return []
    each = [f"`{name}` {overall[name]['left']['median']:.2f}" for name in known]
    steps = figures["preset"]["healing_steps"]
    found = [
        f"After {steps} steps the mean gap is, as a share of what it was before (medians over "
        f"{_cases(overall[known[0]]['left'])}): {listed(each)}."
    ]
    closer, compared = 0, 0
    for case in figures["cases"]:
        before, after = _best(case, "global"), _best(case, "healed")
        if before is not None and after is not None:
            compared += 1
            closer += after > before
    if compared:
        found.append(
            "The best choice's share of `random`'s gap (at 1 the choice would not matter) is "
            f"larger after healing than before in {closer} of {compared} cases."
        )
    return found


def scopes(figures: Figures) -> list[str]:
    found = figures["scopes"]
    known = [name for name in ESTIMATORS if found[name]["of"]]
    if not known:
        return []
    each = [f"`{n}` {found[n]['global_better']} of {found[n]['of']}" for n in known]
    amounts = listed([f"{amount:.0%}" for amount in found[known[0]]["amounts"]])
    return [
        f"At {amounts}, where both ways take as many heads, cutting the lowest of all layers "
        f"rather than as many of each lost less in: {listed(each)} cases."
    ]


def foresight(figures: Figures) -> list[str]:
    found = []
    for run, when in (("global", "as cut"), ("healed", "healed")):
        value = figures["foresight"][run]
        rho = value["spearman"]
        if rho is None:
            continue
        if rho <= -_STRONG:
            says = "who agrees more prunes better"
        elif rho <= -_WEAK:
            says = "who agrees more tends to prune better"
        elif rho < _WEAK:
            says = "agreement says little about pruning"
        else:
            says = "who agrees more prunes worse"
        found.append(
            f"{when.capitalize()}: over {value['pairs']} pairs of a case and an estimator (without "
            f"`{REFERENCE}` and `random`), agreement and mean gap as a share of `random`'s have "
            f"a rank correlation of {rho:.2f}: {says}."
        )
    return found


def _best(case: Figures, run: str) -> float | None:
    shares = [case["share_of_random"][run][name] for name in ESTIMATORS if name != "random"]
    known = [share for share in shares if share is not None]
    return min(known) if known else None


def _cases(value: Mapping[str, Any]) -> str:
    return f"{value['cases']} case{'s' if value['cases'] != 1 else ''}"


def joined(sentences: Sequence[str]) -> str:
    """A list in Markdown, or that there is nothing yet."""
    return "\n".join(f"- {one}" for one in sentences) if sentences else "Nothing measured yet."
