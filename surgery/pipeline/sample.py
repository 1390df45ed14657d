"""Sample text at each moment of a run, for the report."""

from __future__ import annotations

from surgery.config.schema import Task
from surgery.console import say
from surgery.errors import get_first_line
from surgery.measure.sample import make_prompts, write_on
from surgery.pipeline.session import Session


def sample(session: Session, moment: str) -> None:
    """Let the model write on from the same prompts as at the other moments.

    Whatever goes wrong in it ends no run: a line says why there is no text.

    Args:
        moment: as `measure` takes it.
    """
    cfg = session.run.report
    if session.run.model.task is not Task.causal_lm or cfg.prompts == []:
        return
    model, label = session.load_model(), moment.replace("_", " ")
    with session.time_stage(f"sample {label}"):
        found = session.results.samples
        try:
            prompts = make_prompts(session.tokenizer, session.data, cfg.prompts)
            written = [
                write_on(model, session.tokenizer, prompt, cfg.new_tokens) for prompt in prompts
            ]
        except Exception as error:  # whatever a model's own code raises
            problem = f"{type(error).__name__}: {get_first_line(error)}"
            say(f"  no sample text: {problem}")
            found.setdefault("problems", {})[moment] = problem
            return
        texts = found.setdefault("texts", [{"prompt": one.text} for one in prompts])
        for entry, text in zip(texts, written, strict=True):
            entry[moment] = text
