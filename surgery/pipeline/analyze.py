"""The stage `analyze`: what each head does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.config.schema import AnalysisConfig, Task
from surgery.console import say, show
from surgery.data.collate import Batch
from surgery.data.windows import find_special_tokens
from surgery.files import write_json
from surgery.lab.analysis.behaviour import observe_text
from surgery.lab.analysis.clusters import (
    build_tree,
    find_clusters,
    find_shared_groups,
    score_redundancy,
)
from surgery.lab.analysis.draw_maps import draw_map
from surgery.lab.analysis.draw_probes import draw_probes
from surgery.lab.analysis.draw_roles import draw_roles
from surgery.lab.analysis.draw_similarity import draw_similarity
from surgery.lab.analysis.maps import (
    BEST,
    Head,
    check_heads,
    check_maps,
    compute_maps,
    parse_heads,
    pick_best_heads,
)
from surgery.lab.analysis.probes import ProbeResult, run_probes
from surgery.lab.analysis.repeats import Repeats, draw_repeats, observe_repeats
from surgery.lab.analysis.result import (
    FORMAT,
    add_comparisons,
    describe_heads,
    probes_to_json,
    save_heads,
    summarize,
)
from surgery.lab.analysis.roles import Thresholds
from surgery.lab.analysis.similarity import Similarity, compare_heads
from surgery.lab.analysis.sources import check_probes, make_probe_texts, name_probe
from surgery.lab.analysis.table import make_probes_table, make_roles_table
from surgery.lab.analysis.watch import find_self_attention, unmask
from surgery.models.sites import Site
from surgery.pipeline.files import (
    ANALYSIS,
    GROUPS,
    HEADS,
    PROBES_PICTURE,
    REDUNDANCY,
    ROLES_PICTURE,
    SIMILARITY_PICTURE,
)
from surgery.pipeline.session import Session


def check_analysis(cfg: AnalysisConfig, skeleton: PreTrainedModel) -> None:
    """Check the options of the stage.

    Raises:
        ConfigError: the stage cannot be run like this on the model.
    """
    sites = find_self_attention(skeleton)
    check_probes(cfg.probes)
    check_maps(cfg.maps.heads, cfg.maps.texts)
    check_heads(cfg.maps.heads, sites)


def analyze(session: Session) -> None:
    """Observe every head of the model; write tables and pictures.

    Raises:
        TapError: attention that cannot be observed.
    """
    cfg, run, model = session.run.analysis, session.run, session.load_model()
    folder = session.run_dir / ANALYSIS
    folder.mkdir(exist_ok=True)
    thresholds = Thresholds(**vars(cfg.thresholds))
    batches = _pick_batches(session)
    sites = find_self_attention(model)
    behaviour = observe_text(model, batches, sites, cfg.rows, run.seed)
    sites = _keep_observed(sites, behaviour)
    repeats = observe_repeats(model, _draw_repeats(session, batches), sites)
    judged = _run_probes(session, sites)
    similarity = compare_heads(model, batches, sites, cfg.rows, run.seed)
    links = build_tree(similarity.divergence)
    families = find_clusters(links, cfg.cluster_distance)
    heads = describe_heads(sites, behaviour, repeats, judged, thresholds)
    heads = add_comparisons(heads, similarity, families)
    result = {
        "format": FORMAT,
        "model": session.source.name,
        "data": session.data.describe(),
        "windows": sum(len(batch["input_ids"]) for batch in batches),
        "rows": behaviour[sites[0].path].rows,
        "thresholds": thresholds.to_json(),
        "heads": heads,
        "probes": probes_to_json(judged),
        "clusters": _describe_clusters(similarity, links.tolist(), families, cfg.cluster_distance),
    }
    files = _write_tables(session, result, similarity, sites, len(batches), folder)
    files += _draw(result, similarity, links, folder)
    files += _draw_maps(session, sites, heads, folder)
    session.results.analysis = summarize(result, [f"{ANALYSIS}/{name}" for name in files])
    show(make_roles_table(result))
    if judged:
        show(make_probes_table(result))
    say(f"  analysis of {len(heads)} heads: {ANALYSIS}/ ({', '.join(files)})")


def _write_tables(
    session: Session,
    result: Mapping[str, Any],
    similarity: Similarity,
    sites: list[Site],
    batches: int,
    folder: Path,
) -> list[str]:
    save_heads(result, folder / f"{HEADS}.json")
    score_redundancy(
        similarity,
        sites,
        model=session.source.name,
        data=session.data.describe(),
        batches=batches,
        seed=session.run.seed,
    ).save(folder / f"{REDUNDANCY}.json")
    files = [f"{name}{end}" for name in (HEADS, REDUNDANCY) for end in (".json", ".parquet")]
    groups = find_shared_groups(similarity, sites)
    if groups:
        write_json(folder / GROUPS, groups)
        files.append(GROUPS)
    return files


def _draw(result: Mapping[str, Any], similarity: Similarity, links: Any, folder: Path) -> list[str]:
    draw_roles(result, folder / ROLES_PICTURE)
    draw_similarity(result, similarity, links, folder / SIMILARITY_PICTURE)
    if not result["probes"]:
        return [ROLES_PICTURE, SIMILARITY_PICTURE]
    draw_probes(result, folder / PROBES_PICTURE)
    return [ROLES_PICTURE, SIMILARITY_PICTURE, PROBES_PICTURE]


def _pick_batches(session: Session) -> list[Batch]:
    """Pick windows of the run's training text, without masked tokens."""
    cfg = session.run.analysis
    batches = session.data.draw_importance_batches(cfg.windows, cfg.batch_size)
    masked = session.run.model.task is Task.masked_lm
    return [unmask(batch) if masked else batch for batch in batches]


def _keep_observed(sites: Sequence[Site], behaviour: Mapping[str, Any]) -> list[Site]:
    missing = [site for site in sites if site.path not in behaviour]
    for site in missing:
        say(f"  {site.path}: its attention was not called, so its heads are left out")
    return [site for site in sites if site.path in behaviour]


def _draw_repeats(session: Session, batches: Sequence[Batch]) -> Repeats:
    """Draw repeated sequences from the tokens of the observed text, without special tokens."""
    cfg, run = session.run.analysis, session.run
    special = torch.tensor(session.tokenizer.all_special_ids)
    real = [
        batch["input_ids"][batch["attention_mask"] > 0]
        if "attention_mask" in batch
        else batch["input_ids"].flatten()
        for batch in batches
    ]
    vocabulary = torch.cat(real).unique()
    vocabulary = vocabulary[~torch.isin(vocabulary, special)]
    before, after = _find_frame(session)
    room = (run.data.seq_len - len(before) - len(after)) // 2
    return draw_repeats(
        vocabulary,
        cfg.repeats,
        min(cfg.repeat_length, room),
        cfg.batch_size,
        run.seed,
        (before, after),
    )


def _find_frame(session: Session) -> tuple[list[int], list[int]]:
    """Find the special tokens around a text; a causal model needs only those before it."""
    before, after = find_special_tokens(session.tokenizer)
    return before, [] if session.run.model.task is Task.causal_lm else after


def _run_probes(session: Session, sites: Sequence[Site]) -> dict[str, ProbeResult]:
    cfg, run = session.run.analysis, session.run
    found: dict[str, ProbeResult] = {}
    for probe in cfg.probes:
        texts = make_probe_texts(
            probe,
            session.tokenizer,
            count=cfg.probe_texts,
            seq_len=run.data.seq_len,
            seed=run.seed,
            val_fraction=run.data.val_fraction,
        )
        name = name_probe(probe)
        judged, few = run_probes(session.load_model(), texts, sites, name)
        found |= {f"{name}:{relation}": one for relation, one in judged.items()}
        if few:
            say(f"  too few pairs in {name} to judge: {', '.join(few)}")
    return found


def _describe_clusters(
    similarity: Similarity, links: list[list[float]], families: Sequence[int], distance: float
) -> dict[str, Any]:
    members: list[list[list[int]]] = [[] for _ in range(max(families) + 1)]
    for head, family in zip(similarity.heads, families, strict=True):
        members[family].append(list(head))
    return {
        "measure": "mean Jensen-Shannon divergence of attention rows, in bits",
        "method": "average linkage",
        "distance": distance,
        "rows": similarity.rows,
        "members": members,
        "tree": links,
    }


def _draw_maps(
    session: Session, sites: Sequence[Site], heads: Sequence[Mapping[str, Any]], folder: Path
) -> list[str]:
    cfg = session.run.analysis.maps
    if not cfg.heads:
        return []
    chosen: list[Head]
    roles = {(head["layer"], head["head"]): head["role"] for head in heads}
    if cfg.heads == BEST:
        scores = {(h["layer"], h["head"]): h["scores"].get(h["role"]) or 0.0 for h in heads}
        chosen = pick_best_heads(roles, scores)
    else:
        chosen = parse_heads(cfg.heads)
    files = []
    for found in compute_maps(
        session.load_model(),
        session.tokenizer,
        sites,
        chosen,
        list(cfg.texts),
        _find_frame(session),
    ):
        layer, head = found.head
        name = f"map-{layer}.{head}-{found.text + 1}.png"
        draw_map(found, roles.get(found.head, ""), folder / name)
        files.append(name)
    return files
