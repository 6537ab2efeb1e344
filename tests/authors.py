"""Files in the layouts of the paper's authors, with random numbers: what their code would have saved."""

import io
import pickle
import struct

import h5py
import numpy as np
import reference
import torch

GROUPS = {"cifar": (2, 2, 2), "imagenet": (4, 4, 4, 4), "imagenet-table3": (6, 8, 12, 10)}


def trained(release, family, *, base=4, num_classes=10, seed=0):
    """`params` and `stats` of a net as `reference.AuthorsNet` reads them; every number away from its start."""
    rng = torch.Generator().manual_seed(seed)
    halves = 1 if release == "second" else 2
    params, stats = {}, {}

    def random(*shape):
        return torch.randn(*shape, generator=rng)

    def add_batch_norm(name, num):
        params[f"{name}.weight"], params[f"{name}.bias"] = random(num), random(num)
        stats[f"{name}.running_mean"], stats[f"{name}.running_var"] = random(num), random(num).abs() + 0.5

    size = 3 if family == "cifar" else 7
    params["conv"] = random(base, 3, size, size)
    add_batch_norm("bn", base)
    num_in = base
    for group, num_blocks in enumerate(GROUPS[family]):
        num_out = base * 2**group
        for block in range(num_blocks):
            name, shape = f"group{group}.block{block}", (num_out, halves * num_in, 3, 3)
            params[f"{name}.conv"] = 0.1 * random(*shape)
            a, b = ("conv.gamma", "conv.beta") if release == "notebook" else ("alpha", "beta")
            params[f"{name}.{a}"] = 1 + random(num_out if release == "second" else 1)
            params[f"{name}.{b}"] = random(1 if release == "first" else num_out)
            add_batch_norm(f"{name}.bn", num_out)
            eye = reference.delta(shape, "first" if release == "second" else "repeated")
            stats["eye" + "_".join(map(str, shape))] = torch.from_numpy(eye).float()
            num_in = num_out
    params["fc.weight"], params["fc.bias"] = random(num_classes, num_in), random(num_classes)
    return params, stats


def pickled(content, *, zipped=True, device="cpu"):
    """torch.save's bytes, in its old form or as a zip; `device` is where tensors say that they were."""
    file, tagged = io.BytesIO(), torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: device
    try:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    finally:
        torch.serialization.location_tag = tagged
    return file.getvalue()


def pickled_by_python_2(content, *, device="cuda:0"):
    """What torch.save of 2017 wrote under Python 2 of dictionaries of float tensors: byte strings, no `_v2`."""
    storages = {}

    def text(value):
        return b"U" + bytes([len(value)]) + value.encode()

    def whole(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    def write(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(text(key) + write(member) for key, member in value.items()) + b"u"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        storages[str(len(storages))] = value
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(len(storages) - 1)) + text(device)
        storage += write(value.numel()) + b"NtQ"
        sizes = whole(value.shape) + whole(value.stride())
        return b"ctorch._utils\n_rebuild_tensor\n(" + storage + write(0) + sizes + b"tR"

    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, system]
    file = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    file += b"\x80\x02" + write(content) + b"." + pickle.dumps(list(storages), protocol=2)
    return file + b"".join(
        struct.pack("<q", value.numel()) + value.contiguous().numpy().tobytes() for value in storages.values()
    )


def optimizer_state(params):
    """What SGD with momentum saves beside a net."""
    momentum = {index: {"momentum_buffer": value.clone()} for index, value in enumerate(params.values())}
    return {"state": momentum, "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": list(momentum)}]}


def hickled(content, *, version="3.4.9", compression=None):
    """What hickle writes of dictionaries of arrays; from version 3 on, keys are quoted."""
    file = io.BytesIO()
    with h5py.File(file, "w") as root:
        root.attrs.update({"CLASS": "hickle", "VERSION": version, "type": ["hickle"]})
        _add(root, content, quoted=version >= "3", compression=compression)
    return file.getvalue()


def _add(place, value, *, quoted, compression):
    if not isinstance(value, dict):
        dataset = place.create_dataset("data_0", data=np.asarray(value), compression=compression)
        dataset.attrs["type"] = ["ndarray"]
        return
    group = place.create_group("data_0")
    group.attrs["type"] = ["<class 'dict'>" if quoted else "dict"]
    for key, member in value.items():
        item = group.create_group(repr(key) if quoted else key)
        item.attrs["type"] = ["dict_item"]
        _add(item, member, quoted=quoted, compression=compression)


def first_release(family="cifar", **options):
    """model.pt7 of v1's training code, on a GPU, in the old form: (bytes, numbers, release)."""
    params, stats = trained("first", family, **options)
    content = {"params": params, "stats": stats, "optimizer": optimizer_state(params), "epoch": 3}
    return pickled(content, zipped=False, device="cuda:0"), params | stats, "first"


def notebook(family="imagenet", **options):
    """diracnet-18-0.75-br.hkl: what v1 published, unfolded."""
    params, stats = trained("notebook", family, **options)
    return hickled({"params": params, "stats": stats}), params | stats, "notebook"


def published_second(family="imagenet", **options):
    """diracnet18-v2_checkpoint.pth: v2 of January 2018, with its δ among the statistics."""
    params, stats = trained("second", family, **options)
    return pickled({"params": params, "stats": stats}, zipped=False, device="cuda:0"), params | stats, "second"


def second_release(family="cifar", **options):
    """model.pt7 of v2's training code as it is today: all in `params`, gradients wanted."""
    params, stats = trained("second", family, **options)
    saved = {name: value.clone().requires_grad_(name in params) for name, value in (params | stats).items()}
    content = {"params": saved, "optimizer": optimizer_state(params), "epoch": 3}
    return pickled(content), params | stats, "second"


def folded_first(family="imagenet", **options):
    """diracnet-18-0.75-br-export.hkl: v1's published net, folded."""
    params, stats = trained("notebook", family, **options)
    folded = _singles(reference.authors_fold(params | stats, "notebook"))
    return hickled(folded, version="2.1.0"), folded, "notebook"


def folded_second(family="imagenet", **options):
    """diracnet18v2folded-a2174e15.pth: v2's published net, folded, a state dict in the old form."""
    params, stats = trained("second", family, **options)
    folded = _singles(reference.authors_fold(params | stats, "second"))
    state = {name if name.startswith("fc") else f"features.{name}": torch.tensor(v) for name, v in folded.items()}
    return pickled(state, zipped=False), folded, "second"


def _singles(numbers):
    return {name: value.astype(np.float32) for name, value in numbers.items()}
