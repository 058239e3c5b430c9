#!/bin/sh
# Fill vendor/ with the page's two libraries: npm's packages at exact versions, checked against vendor.sha256.
set -eu
cd "$(dirname "$0")"
sha256sum --check --status vendor.sha256 2> /dev/null && exit
command -v npm > /dev/null || { echo "no npm, which fetches the page's libraries: sudo apt-get install npm" >&2; exit 1; }
mkdir -p vendor
take() { # package, its files
  archive=$(npm pack --silent --pack-destination vendor "$1")
  shift
  for file; do
    tar -xzf "vendor/$archive" -C vendor --strip-components=2 "package/dist/$file"
  done
  rm "vendor/$archive"
}
take @huggingface/transformers@4.3.1 transformers.min.js
take onnxruntime-web@1.31.0-dev.20260914-8d85527a0 ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm
sha256sum --check --quiet vendor.sha256
