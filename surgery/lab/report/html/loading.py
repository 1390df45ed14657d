"""How the export is loaded, as code to copy."""

from __future__ import annotations

from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.markup import Markup, code, join, tag

# end of the class's name → transformers' class that finds it
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def loading(run: RunFiles) -> Markup | None:
    """What to do with `export/`; ``None`` where there is none."""
    export = run.summary.get("export") or {}
    if not export:
        return None
    where = [" ", tag("code", export["path"]), " is the folder beside this page."]
    said = [tag("p", _FORMATS[export["format"]], where), code(snippet(run))]
    if "vllm" in export["runtimes"]:
        said += [tag("p", "vLLM lists the architecture (not run here):")]
        said += [code(f"vllm serve {export['path']}")]
    if "llama.cpp" in export["runtimes"]:
        said += [tag("p", "llama.cpp's converter lists it too (not run here):")]
        said += [code(f"python convert_hf_to_gguf.py {export['path']}")]
    size = f"{export['bytes'] / 1e6:,.1f} MB of weights in {export['dtype']}."
    difference = export["max_logit_difference_after_reload"]
    if difference is not None:
        size += f" Loaded again, its logits differed by at most {difference:.2g}."
    return join(said, tag("p", size, class_="quiet"))


def snippet(run: RunFiles) -> str:
    """Python that loads the export, run in the run directory."""
    export = run.summary["export"]
    name = str(run.summary["model"]["class"])
    auto = next((auto for end, auto in _AUTO.items() if name.endswith(end)), name)
    lines = [f"from transformers import {', '.join(sorted((auto, 'AutoTokenizer')))}", ""]
    if export["format"] == "record":
        lines.insert(0, "import surgery  # reads the record; without it transformers cannot\n")
    backend = run.plan.get("implementation")
    extra = f', attn_implementation="{backend}"' if backend else ""
    lines += [
        f'model = {auto}.from_pretrained("{export["path"]}"{extra})',
        f'tokenizer = AutoTokenizer.from_pretrained("{export["path"]}")',
    ]
    return "\n".join(lines)


_FORMATS = {
    "native": "Stock transformers; this package is not needed.",
    "converted": "Stock transformers, as another architecture that can say the result; this "
    "package is not needed.",
    "record": "The architecture's config cannot say the result. A record beside it can, and "
    "transformers reads that once this package is imported.",
}
