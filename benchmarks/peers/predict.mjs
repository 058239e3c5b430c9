// What other JavaScript packages say about faces, with the same input, output and timing as predict.py.
//
//     npm install --save-exact @tensorflow/tfjs@4.22.0 @tensorflow/tfjs-backend-wasm@4.22.0 \
//         @vladmandic/face-api@1.7.15 @vladmandic/human@3.3.6
//     node benchmarks/peers/predict.mjs face_api --environment ENVIRONMENT --faces runs/peers/faces --out runs/peers
//
// Runs on WebAssembly, which has one thread outside a browser.

import fs from 'node:fs';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';

const CHUNK = 64; // faces of one call
const BATCHES = [1, 64];

// @vladmandic/face-api: the expression network of face-api.js, whose class resizes and normalises.
async function faceApi(require, tf, folder) {
  const faceapi = require('@vladmandic/face-api/dist/face-api.node-wasm.js');
  const net = faceapi.nets.faceExpressionNet;
  const models = path.join(folder, '@vladmandic/face-api/model');
  await net.loadFromDisk(models);
  const classes = [...faceapi.FACE_EXPRESSION_LABELS];
  const weights = JSON.parse(fs.readFileSync(path.join(models, 'face_expression_model-weights_manifest.json')))[0].weights;
  const classify = async (faces, side) => {
    const tensors = faces.map((face) => tf.tidy(() => tf.tile(tf.tensor3d(face, [side, side, 1], 'int32'), [1, 1, 3])));
    const found = await net.predictExpressions(tensors);
    tf.dispose(tensors);
    return found.map((expressions) => classes.map((name) => expressions[name]));
  };
  const about = {
    classes,
    input: '112 x 112, grey three times',
    parameters: count(weights),
    bytes: fs.statSync(path.join(models, 'face_expression_model.bin')).size,
    one_by_one: false,
  };
  return { name: '@vladmandic/face-api', about, classify };
}

// @vladmandic/human: its emotion model alone, prepared as in its src/gear/emotion.ts.
async function human(require, tf, folder) {
  const models = path.join(folder, '@vladmandic/human/models');
  const { modelTopology, weightsManifest } = JSON.parse(fs.readFileSync(path.join(models, 'emotion.json')));
  const bytes = fs.readFileSync(path.join(models, weightsManifest[0].paths[0]));
  const weightSpecs = weightsManifest.flatMap((part) => part.weights);
  const weightData = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
  const model = await tf.loadGraphModel(tf.io.fromMemory({ modelTopology, weightSpecs, weightData }));
  const side = model.inputs[0].shape[2];
  const grey = [0.2989, 0.587, 0.114];
  const one = async (face, size) => {
    const found = tf.tidy(() => {
      const image = tf.tile(tf.div(tf.tensor4d(face, [1, size, size, 1], 'float32'), 255), [1, 1, 1, 3]);
      const resized = tf.image.resizeBilinear(image, [side, side], false);
      const weighted = tf.sum(tf.mul(resized, grey), 3, true);
      return model.execute(tf.mul(tf.sub(weighted, 0.5), 2));
    });
    const values = Array.from(await found.data());
    found.dispose();
    return values;
  };
  const classify = async (faces, size) => {
    const rows = [];
    for (const face of faces) rows.push(await one(face, size));
    return rows;
  };
  const about = {
    classes: ['angry', 'disgust', 'fear', 'happy', 'sad', 'surprise', 'neutral'],
    input: `${side} x ${side} grey`,
    parameters: count(weightSpecs),
    bytes: bytes.length,
    one_by_one: true,
  };
  return { name: '@vladmandic/human', about, classify };
}

const PEERS = { face_api: faceApi, human };

function count(weights) {
  return weights.reduce((sum, { shape }) => sum + shape.reduce((product, size) => product * size, 1), 0);
}

function readFaces(folder) {
  const files = fs.existsSync(folder) ? fs.readdirSync(folder).filter((file) => file.endsWith('.json')).sort() : [];
  if (!files.length) throw new Error(`${folder} holds no faces: write them with \`python -m benchmarks.peers faces\``);
  return files.map((file) => {
    const { faces, side } = JSON.parse(fs.readFileSync(path.join(folder, file)));
    const bytes = fs.readFileSync(path.join(folder, file.replace('.json', '.bin')));
    const rows = Array.from({ length: faces }, (_, i) => bytes.subarray(i * side * side, (i + 1) * side * side));
    return { name: file.replace('.json', ''), side, rows };
  });
}

// Time per face by batch: the fastest of many calls, since what else the machine does only ever adds.
async function milliseconds(classify, { rows, side }, seconds) {
  const fastest = {};
  for (const batch of BATCHES) {
    const spent = [];
    const faces = rows.slice(0, batch);
    await classify(faces, side); // the first one warms up
    const end = performance.now() + seconds * 1e3;
    while (performance.now() < end || spent.length < 3) {
      const start = performance.now();
      await classify(faces, side);
      spent.push(performance.now() - start);
    }
    fastest[batch] = Math.min(...spent) / batch;
  }
  return fastest;
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      environment: { type: 'string' },
      faces: { type: 'string', default: 'runs/peers/faces' },
      out: { type: 'string', default: 'runs/peers' },
      seconds: { type: 'string', default: '5' },
      'only-time': { type: 'boolean', default: false },
    },
  });
  const [peer] = positionals;
  if (!(peer in PEERS)) throw new Error(`unknown peer ${peer}; known: ${Object.keys(PEERS).join(', ')}`);
  if (!values.environment) throw new Error('--environment: name the folder in which npm installed the packages');
  const require = createRequire(path.resolve(values.environment, 'package.json'));
  const folder = path.resolve(values.environment, 'node_modules');
  const tf = require('@tensorflow/tfjs');
  const wasm = require('@tensorflow/tfjs-backend-wasm');
  wasm.setWasmPaths(path.join(folder, '@tensorflow/tfjs-backend-wasm/dist/'));
  await tf.setBackend('wasm');
  await tf.ready();
  if (tf.getBackend() !== 'wasm') throw new Error(`the backend is ${tf.getBackend()}, not wasm`);

  const { name, about, classify } = await PEERS[peer](require, tf, folder);
  const sets = readFaces(values.faces);
  const out = path.join(values.out, peer);
  fs.mkdirSync(out, { recursive: true });
  for (const { name: set, side, rows } of values['only-time'] ? [] : sets) {
    const lines = [['row', ...about.classes].join(',')];
    for (let start = 0; start < rows.length; start += CHUNK) {
      const found = await classify(rows.slice(start, start + CHUNK), side);
      found.forEach((row, i) => lines.push([start + i, ...row.map((value) => Number(value.toPrecision(6)))].join(',')));
    }
    fs.writeFileSync(path.join(out, `.${set}.csv`), lines.join('\n') + '\n');
    fs.renameSync(path.join(out, `.${set}.csv`), path.join(out, `${set}.csv`));
  }
  const version = JSON.parse(fs.readFileSync(path.join(folder, name, 'package.json'))).version;
  const aboutFile = {
    package: `${name} ${version}`,
    runtime: `TensorFlow.js ${tf.version_core} WebAssembly`,
    ...about,
    threads: 1,
    ms_per_face: await milliseconds(classify, sets.find((set) => set.name === 'fer2013'), Number(values.seconds)),
    cores: os.availableParallelism(),
    load: os.loadavg()[0],
    node: process.version,
  };
  fs.writeFileSync(path.join(out, 'about.json'), JSON.stringify(aboutFile, null, 2) + '\n');
  console.log(peer, aboutFile);
}

main();
