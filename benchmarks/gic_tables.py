"""What gic_families.py makes of its records: a table, mean DERs in words, a heat map."""

from __future__ import annotations

import csv
import itertools
import statistics
from pathlib import Path
from typing import Any

from bdfast.testing.tables import Table, markdown_table
from benchmarks.gic_picture import draw

WITHOUT, WITH = "without", "GIC"


def mean(records: list[dict[str, Any]], **chosen: Any) -> dict[str, float] | None:
    """ACC, ASR, RA and DER in percent, over the records with these values; None if there are none."""
    some = [r for r in records if all(r[name] == value for name, value in chosen.items())]
    if not some:
        return None
    rates = {name: statistics.fmean(r["after"][name] for r in some) for name in ("acc", "asr", "ra")}
    return {**rates, "der": statistics.fmean(r["der"] for r in some)}


def table(records: list[dict[str, Any]]) -> Table:
    """A line a family and purifier: means over seeds, without and with GIC."""
    header = ["family", "purifier", *(f"{r}{w}" for w in ("", " GIC") for r in ("ACC", "ASR", "RA", "DER")), "change"]
    lines: list[list[Any]] = []
    for family, purifier in itertools.product(_order(records, "family"), _order(records, "purifier")):
        rates = [mean(records, family=family, purifier=purifier, data=data) for data in (WITHOUT, WITH)]
        cells = [cell for r in rates for cell in (["-"] * 4 if r is None else [f"{v:.1f}" for v in r.values()])]
        change = f"{round(rates[1]['der'] - rates[0]['der'], 1) + 0.0:+.1f}" if rates[0] and rates[1] else "-"
        lines.append([family, purifier, *cells, change])
    return header, lines


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean DER by purifier and over all, over the pairs that are complete; how many of them GIC improved."""
    pairs: dict[tuple[Any, ...], dict[str, float]] = {}
    for r in records:
        pairs.setdefault((r["seed"], r["family"], r["purifier"]), {})[r["data"]] = r["der"]
    whole = {key: pair for key, pair in pairs.items() if len(pair) == 2}
    by: dict[str, Any] = {}
    for name in [*_order(records, "purifier"), "all"]:
        some = [pair for key, pair in whole.items() if name in (key[2], "all")]
        if some:
            changes = [pair[WITH] - pair[WITHOUT] for pair in some]
            by[name] = {
                "pairs": len(some),
                "without": round(statistics.fmean(pair[WITHOUT] for pair in some), 2),
                "with": round(statistics.fmean(pair[WITH] for pair in some), 2),
                "better": sum(change > 0 for change in changes),
                "worse": sum(change < 0 for change in changes),
                "spread": round(statistics.stdev(changes), 2) if len(changes) > 1 else None,
            }
    return by


def verdict(by: dict[str, Any]) -> str:
    """The mean DERs in words."""
    return "\n".join(
        f"{name}: mean DER {line['without']:.2f} without, {line['with']:.2f} with GIC "
        f"({line['with'] - line['without']:+.2f}; better in {line['better']}, worse in {line['worse']} of "
        f"{line['pairs']} pairs, standard deviation of the change {line['spread']})"
        for name, line in by.items()
    )


def write_tables(path: Path, result: dict[str, Any]) -> None:
    """Markdown, CSV and the heat map beside the JSON."""
    records, facts = result["records"], result["environment"]
    before = [r["before"] for r in {r["seed"]: r for r in records}.values()]
    victims = ", ".join(f"ACC {b['acc']:.1f} ASR {b['asr']:.1f}" for b in before)
    state = "" if result["complete"] else " (not complete)"
    text = [
        f"# GIC by families of auxiliary data: {result['settings']['data']}{state}",
        "",
        f"Means over seeds {result['settings']['seeds']}, percent. Victims: {victims}.",
        f"GIC: {result['settings']['gic']}.",
        "",
        markdown_table(table(records)),
        "",
        *(f"- {line}" for line in verdict(result["summary"]).splitlines()),
        f"- `{facts['command']}` at {facts['commit']}, {facts['date']}, {facts['machine']['cpu']}",
    ]
    path.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "family", "purifier", "data", "acc", "asr", "ra", "der", "seconds"])
        for r in records:
            writer.writerow(
                [r["seed"], r["family"], r["purifier"], r["data"], *r["after"].values(), r["der"], r["seconds"]]
            )
    config = result["settings"]["gic"]
    about = f"{config['mode']}, delta {255 * config['delta']:.3g}/255, w_bn {config['w_bn']:g}"
    draw(path.with_suffix(".png"), f"GIC on {result['settings']['data']} ({about})", grid(records))


def grid(records: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """family -> purifier -> mean DER without and with GIC."""
    return {
        family: {
            purifier: tuple(
                None if (r := mean(records, family=family, purifier=purifier, data=data)) is None else r["der"]
                for data in (WITHOUT, WITH)
            )
            for purifier in _order(records, "purifier")
        }
        for family in _order(records, "family")
    }  # type: ignore[return-value]


def _order(records: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(r[name] for r in records))
