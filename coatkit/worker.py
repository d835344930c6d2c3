"""An expert's side of `coatkit.foreign`: loads it and encodes in an interpreter that has not what coatkit needs.

Run as a file, `PYTHON -I -B worker.py FOLDER IN OUT`, by coatkit itself. FOLDER holds a link to this package and to the
expert's; IN and OUT are descriptors of pipes. Each message is `coat`, the length of a header (4 bytes, little-endian),
the header as JSON, and as many raw bytes as its `bytes` says. Here there need be nothing but torch and numpy, and until
the version of Python is known to do, nothing but the standard library is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import struct
import sys
import traceback
import types
from typing import Any, BinaryIO

OLDEST = (3, 11)
MAGIC = b"coat"
_FRAME = struct.Struct("<4sI")


def pack(header: dict[str, Any], payload: bytes | memoryview = b"") -> bytes:
    """What goes before the payload on a pipe."""
    text = json.dumps({**header, "bytes": len(payload)}).encode()
    return _FRAME.pack(MAGIC, len(text)) + text


def unpack_length(frame: bytes) -> int:
    """Length of the header that follows the first 8 bytes of a message.

    Raises:
        ValueError: If it is no message.
    """
    magic, length = _FRAME.unpack(frame)
    if magic != MAGIC or length > 1 << 24:
        raise ValueError(f"{frame!r} is not the start of a message")
    return int(length)


def main() -> None:
    """Answer messages until the pipe is closed."""
    folder, source, sink = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for descriptor in (source, sink):  # programs that the expert starts must not hold the pipes open
        os.set_inheritable(descriptor, False)
    with os.fdopen(source, "rb") as incoming, os.fdopen(sink, "wb") as outgoing:
        version = sys.version_info[:3]
        send(outgoing, {"python": list(version), "oldest": list(OLDEST)})
        if version >= OLDEST:
            with contextlib.suppress(EOFError, BrokenPipeError):  # the other side has gone
                answer(folder, incoming, outgoing)


def answer(folder: str, incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Load the expert that the first message names; then encode what comes."""
    order, _ = receive(incoming)
    try:
        import torch
    except ImportError as error:
        send(outgoing, failure("torch", error))
        return
    step = "import"
    try:
        sys.path.insert(0, folder)
        cls = find(order)
        step = "make"
        if cls.uses_backbone:
            raise TypeError("it reads the backbone's features, which are not here")
        draw(order["use"])
        expert = cls(**order["options"])
        step = "load"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        draw(order["use"])
        expert.load(device, torch.float32)
        step = "describe"
        said = {name: getattr(expert, name, None) for name in ("sample_rate", "frame_rate", "dim")}
        for name, value in said.items():
            if not isinstance(value, (int, float)) or not value > 0:
                raise TypeError(f"the expert's {name} is {value!r}; set it to a positive number")
        said.update(upsampling=expert.upsampling, hears_all=expert.hears_all, fingerprint=expert.fingerprint())
    except BaseException as error:  # SystemExit too: a package may leave when it does not like what it sees
        send(outgoing, failure(step, error))
        return
    send(outgoing, {"loaded": said, "device": str(device), "torch": str(torch.__version__)})
    while True:
        order, payload = receive(incoming)
        try:
            header, values = encode(expert, order, payload, device)
        except BaseException as error:
            send(outgoing, failure("encode", error))
        else:
            send(outgoing, header, values)


def find(order: dict[str, Any]) -> Any:
    """The expert's class, by `file` or `module`, and `name`."""
    from coatkit.protocols import Expert

    if importlib.util.find_spec("pluggy") is None:
        # A plugin's package marks its hook when it is imported. The mark is for finding plugins, which is done already.
        marks: Any = types.ModuleType("coatkit.hookspecs")
        marks.hookimpl = lambda function: function
        sys.modules["coatkit.hookspecs"] = marks
    if file := order.get("file"):
        sys.path.append(os.path.dirname(file))  # last: what lies beside the file takes no package's place
        with open(file, "rb") as stream:
            digest = hashlib.sha256(file.encode() + stream.read()).hexdigest()[:12]
        name = f"coatkit_user_{os.path.splitext(os.path.basename(file))[0]}_{digest}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(order["module"])
    cls = getattr(module, order["name"], None)
    if cls is None:
        raise AttributeError(f"there is no {order['name']!r} in {order.get('file') or order['module']}")
    if not (isinstance(cls, type) and issubclass(cls, Expert)):
        raise TypeError(f"{order['name']} is not a subclass of coatkit.Expert")
    return cls


def draw(use: str) -> None:
    """Start random numbers where `coatkit.build.load_expert` starts them, so that both make the same expert."""
    import torch

    torch.manual_seed(int.from_bytes(hashlib.sha256(f"0:expert {use}".encode()).digest()[:7], "big"))


def encode(expert: Any, order: dict[str, Any], payload: bytearray, device: Any) -> tuple[dict[str, Any], memoryview]:
    """Features of a batch, [A, N] float32 as raw bytes: the header and the values [A, L, dim], float32."""
    import torch

    from coatkit.protocols import AudioBatch, Features

    samples = torch.frombuffer(payload, dtype=torch.float32).reshape(order["shape"])
    audio = AudioBatch(samples, torch.tensor(order["lengths"]), order["sample_rate"]).to(device)
    with torch.no_grad(), exact(device):
        features = expert.encode(audio)
    if not isinstance(features, Features):
        raise TypeError(f"encode must give Features, not {type(features).__name__}")
    values = features.values.detach().to("cpu", torch.float32).contiguous()
    header = {
        "shape": list(values.shape),
        "lengths": [int(length) for length in features.lengths],
        "frame_rate": float(features.frame_rate),
        "offset": float(features.offset),
    }
    return header, values.view(torch.uint8).reshape(-1).numpy().data


def exact(device: Any) -> contextlib.AbstractContextManager[None]:
    """Real float32, with older versions of torch too."""
    import torch

    if hasattr(torch.backends.cudnn, "conv"):
        from coatkit.precision import exact_float32

        return exact_float32(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return contextlib.nullcontext()


def failure(step: str, error: BaseException) -> dict[str, Any]:
    """What went wrong, and where: the last line of the traceback that is in a file."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if frame.filename != __file__ and frame.filename[:1] != "<"), None)
    return {
        "failed": step,
        "kind": type(error).__name__,
        "message": str(error),
        "missing": error.name if isinstance(error, ModuleNotFoundError) else None,
        "frame": None if last is None else f"{last.filename}:{last.lineno}, in {last.name}: {last.line}",
    }


def send(outgoing: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message."""
    outgoing.write(pack(header, payload))
    outgoing.write(payload)
    outgoing.flush()


def receive(incoming: BinaryIO) -> tuple[dict[str, Any], bytearray]:
    """Read one message.

    Raises:
        EOFError: If the pipe is closed.
    """
    header = json.loads(_read(incoming, unpack_length(bytes(_read(incoming, _FRAME.size)))))
    return header, _read(incoming, header["bytes"])


def _read(incoming: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while size:
        got: int = incoming.readinto(view[-size:])  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if not got:
            raise EOFError
        size -= got
    return data


if __name__ == "__main__":
    main()
