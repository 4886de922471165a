// The page: texts in, the answers of all tasks out, on this device alone.

import { Tokenizer } from "./tokenizer.js";

const PAUSE = 250; // milliseconds without a key until there is an answer
const [labels, settings] = await Promise.all([read("labels.json", "json"), read("tokenizer.json", "json")]);
const opened = openSession(); // begun here, so that the model is on its way while the tokenizer is made
const tokenizer = new Tokenizer(settings);
const texts = ["first", "second"].map((id) => document.getElementById(id));
const state = document.getElementById("state");

// A file as `kind`, such as "json".
async function read(name, kind) {
  const found = await fetch(name);
  if (!found.ok) throw new Error(`${name}: ${found.status}`);
  return found[kind]();
}

// onnxruntime and the model are the slow part; the page is there before them.
async function openSession() {
  const [ort, model] = await Promise.all([import("./ort.wasm.min.mjs"), read(settings.model, "arrayBuffer")]);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  return { ort, session: await ort.InferenceSession.create(model) };
}

// The graph's inputs for sequences of token ids, padded to the longest.
function feed(ort, sequences) {
  const length = Math.max(...sequences.map(({ ids }) => ids.length));
  const values = [[], [], []];
  for (const { ids, first } of sequences)
    for (let place = 0; place < length; place++) {
      const isReal = place < ids.length;
      [isReal ? ids[place] : 0, isReal, isReal && place >= first].forEach((value, i) => values[i].push(BigInt(value)));
    }
  const tensor = (of) => new ort.Tensor("int64", BigInt64Array.from(of), [sequences.length, length]);
  return Object.fromEntries(["input_ids", "attention_mask", "token_type_ids"].map((name, i) => [name, tensor(values[i])]));
}

// Of each task that reads so many texts its numbers, and the milliseconds that all of them took.
export async function answer(given) {
  const { ort, session } = await opened;
  const started = performance.now();
  const answers = {};
  for (const isSplit of [false, true]) {
    const names = Object.keys(labels.tasks).filter((name) => {
      const task = labels.tasks[name];
      return task.texts.length <= given.length && task.two_sequences === isSplit;
    });
    for (const count of new Set(names.map((name) => labels.tasks[name].texts.length))) {
      const wanted = names.filter((name) => labels.tasks[name].texts.length === count);
      const read = given.slice(0, count);
      const sequences = isSplit ? read.map((text) => tokenizer.encode([text])) : [tokenizer.encode(read)];
      for (const sequence of isSplit ? sequences : []) sequence.first = sequence.ids.length;
      const found = await session.run(feed(ort, sequences), wanted);
      for (const name of wanted) answers[name] = [...found[name].data];
    }
  }
  return { answers, milliseconds: performance.now() - started };
}

// A task's answer as [words, confidence, rows of the bars]: each row a name, a share of the bar, and what stands behind it.
function describe(task, values) {
  const percent = (share) => `${(100 * share).toFixed(0)} %`;
  if (task.output === "score") {
    const [low, high] = task.scale;
    return [values[0].toFixed(1), `on a scale from ${low} to ${high}`, [["", (values[0] - low) / (high - low), ""]]];
  }
  const shares = task.output === "probability" ? [1 - values[0], values[0]] : values;
  const best = shares.indexOf(Math.max(...shares));
  return [task.classes[best], percent(shares[best]), task.classes.map((name, i) => [name, shares[i], percent(shares[i])])];
}

function show(answers) {
  for (const [name, task] of Object.entries(labels.tasks)) {
    const missing = task.texts.length === 2 ? "needs two sentences" : "needs a sentence";
    const [words, confidence, rows] = answers[name] ? describe(task, answers[name]) : ["–", missing, []];
    const card = document.getElementById(`task-${name}`);
    card.querySelector("output").textContent = words;
    card.querySelector(".confidence").textContent = confidence;
    card.querySelector(".bars").replaceChildren(
      ...rows.flatMap(([label, share, value]) => {
        const cells = [label, "", value].map((text) => Object.assign(document.createElement("span"), { textContent: text }));
        cells[1].className = "bar";
        cells[1].style.setProperty("--share", share);
        return cells;
      }),
    );
  }
}

for (const [name, task] of Object.entries(labels.tasks)) {
  const card = document.getElementById("card").content.cloneNode(true);
  card.querySelector("section").id = `task-${name}`;
  card.querySelector("h2").textContent = `${task.title}, ${task.texts.length === 1 ? "of the first sentence" : "of both"}`;
  document.getElementById("answers").append(card);
}

let number = 0;
async function update() {
  const mine = ++number;
  const values = texts.map((text) => text.value);
  const given = values[0].trim() ? values.filter((text) => text.trim()) : []; // one sentence is the first
  try {
    const { answers, milliseconds } = given.length ? await answer(given) : { answers: {} };
    if (mine !== number) return;
    show(answers);
    state.textContent = given.length ? `${milliseconds.toFixed(1)} ms for all answers, on this device` : "";
  } catch (error) {
    state.textContent = `The model cannot be used: ${error.message}`;
  }
}
let timer;
document.querySelector("form").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(update, PAUSE);
});
document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  update();
});
if ("serviceWorker" in navigator) navigator.serviceWorker.register("sw.js");
await update();
globalThis.demo = { encode: (given) => tokenizer.encode(given), answer };
