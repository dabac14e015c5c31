"""Checkpoints on the disk and what two readers make of them, for tests of what people bring."""

import json

import torch
from safetensors.torch import load_file, save_file

from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint

IDS = torch.randint(16, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model):
    extra = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **extra, use_cache=False).logits


def source_of(tiny, folder, family, dtype=torch.float32, **changes):
    model = tiny.make(family, dtype, **changes)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return type(model)


def compressed(tiny, source, out, method="rtn", **options):
    text = tiny.save_text(out.with_name("text.txt"), 400)
    options = {"calib_tokens": 96, "ctx": 24, "unseen": 0, **options}
    return compress(str(source), out, Settings(method=method, calib=str(text), **options))


def edit(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def exported(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def shards(directory, tensors, folder=""):
    names = sorted(tensors)
    parts = {f"{folder}model-{i}.safetensors": names[i::2] for i in range(2)}
    (directory / folder).mkdir(exist_ok=True)
    for file, some in parts.items():
        save_file({n: tensors[n] for n in some}, directory / file, {"format": "pt"})
    return {n: file for file, some in parts.items() for n in some}


def write_index(directory, where):
    text = json.dumps({"metadata": {}, "weight_map": where})
    (directory / "model.safetensors.index.json").write_text(text)


def same(source, cls):
    ours = StreamedModel(open_checkpoint(source)).whole()
    theirs = cls.from_pretrained(source, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
