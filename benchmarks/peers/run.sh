#!/bin/sh
# Peers and ours on the same faces, from nothing to benchmarks/peers.md:
#
#     sh benchmarks/peers/run.sh checkpoints/abaw-fer-small
#
# Prepared data first: `fer data prepare fer2013` into data/fer2013, and labelled faces of another source, with
# `fer data prepare folder --validation_fraction 0 --test_fraction 0`, into data/faces_labelled. Then everything
# else, environments included, happens here. Environments are kept in $ENVIRONMENTS; predictions in runs/peers.
# CORES=0,1 chooses the cores to run on. ONLY_TIME=1 keeps the peers' predictions and measures their time again.
set -eu

MODEL=${1:?which model folder?}
ENVIRONMENTS=${ENVIRONMENTS:-/tmp/abaw-fer-peers}
PYTHON=${PYTHON:-.venv/bin/python}
ON=${CORES:+taskset -c $CORES}
OPTIONS=${ONLY_TIME:+--only-time}
export TF_CPP_MIN_LOG_LEVEL=3

mkdir -p "$ENVIRONMENTS"
if ! [ -e "$ENVIRONMENTS/tensorflow/done" ]; then
    python3 -m venv "$ENVIRONMENTS/tensorflow"
    "$ENVIRONMENTS/tensorflow/bin/pip" install --quiet tensorflow-cpu==2.21.0 opencv-python-headless==4.14.0.94 \
        scikit-image==0.26.0 requests==2.34.2 pillow==13.0.0 setuptools==65.5.0
    "$ENVIRONMENTS/tensorflow/bin/pip" install --quiet --no-deps fer==25.10.3 facex==1.1.0
    touch "$ENVIRONMENTS/tensorflow/done"
fi
if ! [ -e "$ENVIRONMENTS/torch/done" ]; then
    python3 -m venv "$ENVIRONMENTS/torch"
    "$ENVIRONMENTS/torch/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pillow==13.0.0
    "$ENVIRONMENTS/torch/bin/pip" install --quiet --no-deps facial-emotion-recognition==0.3.4
    touch "$ENVIRONMENTS/torch/done"
fi
if ! [ -e "$ENVIRONMENTS/javascript/done" ]; then
    mkdir -p "$ENVIRONMENTS/javascript"
    npm install --prefix "$ENVIRONMENTS/javascript" --no-audit --no-fund --ignore-scripts --save-exact \
        @tensorflow/tfjs@4.22.0 @tensorflow/tfjs-backend-wasm@4.22.0 @vladmandic/face-api@1.7.15 @vladmandic/human@3.3.6
    touch "$ENVIRONMENTS/javascript/done"
fi

$PYTHON -m benchmarks.peers faces
for peer in fer_lite fer_keras facex; do
    $ON "$ENVIRONMENTS/tensorflow/bin/python" -W ignore benchmarks/peers/predict.py $peer $OPTIONS
done
$ON "$ENVIRONMENTS/torch/bin/python" benchmarks/peers/predict.py facial_emotion_recognition $OPTIONS
for peer in face_api human; do
    $ON node benchmarks/peers/predict.mjs $peer --environment "$ENVIRONMENTS/javascript" $OPTIONS
done
$ON "$PYTHON" -m benchmarks.peers report --model "$MODEL"
