// The form, the requests and their pictures.
"use strict";

const $ = (id) => document.getElementById(id);
const FAST_MS = 150, SLOW_MS = 1500, PREVIEWS = 8, KEPT_GROUPS = 20;
const running = new Set();
let model = null, requests = 0;

function headers(more = {}) {
  const key = $("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function messageOf(answer) {
  try { return (await answer.json()).error.message; } catch { return `the server answered ${answer.status}`; }
}

function option(select, value, text) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  select.append(element);
}

function tag(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element[key] = value;
  element.append(...children);
  return element;
}

async function connect() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (answer.status === 401) {
    $("key-field").hidden = false;
    setPhase("unreachable", "an API key is needed");
    return false;
  }
  if (!answer.ok) throw new Error(await messageOf(answer));
  model = (await answer.json()).data[0];
  $("key-field").hidden = true;
  $("model").textContent = model.id;
  document.title = `${model.id} \u00b7 qdm-deploy`;
  const [width, height] = model.size.split("x").map(Number);
  document.documentElement.style.setProperty("--ratio", width / height);
  $("label-field").hidden = model.num_classes === null;
  $("label").replaceChildren();
  option($("label"), "", "in turn, by the seed");
  for (let i = 0; i < (model.num_classes ?? 0); i++) option($("label"), String(i), model.labels ? model.labels[i] : String(i));
  $("guidance-field").hidden = !model.guidance;
  $("sampler").replaceChildren();
  for (const name of model.samplers) option($("sampler"), name, name);
  $("sampler").value = "ddim";
  $("count").max = model.max_images;
  $("count").value = Math.min(Number($("count").value), model.max_images);
  $("steps").max = model.max_steps;
  $("steps").value = Math.min(Number($("steps").value), model.max_steps);
  return true;
}

function setPhase(phase, text) {
  $("dot").className = phase;
  if ($("phase").textContent !== text) $("phase").textContent = text;
  $("go").disabled = phase !== "ready";
}

async function watch() {
  let wait = SLOW_MS;
  try {
    if (!document.hidden && (model !== null || await connect())) {
      const answer = await fetch("/v1/engine", { headers: headers() });
      if (!answer.ok) throw new Error(await messageOf(answer));
      const state = await answer.json();
      setPhase(state.phase, state.phase);
      const backend = state.backend.backend;
      $("backend").textContent = backend ? `\u00b7 ${backend} ${(state.backend.version ?? "").split("-")[0]} \u00b7 ${model.size}` : "";
      Batch.draw(state);
      if (state.running_rows || state.waiting || running.size) wait = FAST_MS;
    }
  } catch (error) {
    setPhase("unreachable", `no answer: ${error.message}`);
  }
  setTimeout(watch, wait);
}

// Pictures of one request, one tile each, before anything has come.
function newGroup(wish) {
  const title = tag("h3", { textContent: `Request ${++requests}: waiting` });
  const list = tag("ul", { className: "tiles" });
  const tiles = [];
  for (let i = 0; i < wish.n; i++) {
    const image = tag("img", { alt: `Image ${i + 1} of request ${requests}, not begun` });
    const bar = tag("progress", { max: wish.num_inference_steps, value: 0, ariaLabel: `Steps of image ${i + 1}` });
    const caption = tag("figcaption", { textContent: "\u2026" });
    image.hidden = true;
    const figure = tag("figure", {}, tag("div", { className: "frame" }, image), bar, caption);
    list.append(tag("li", {}, figure));
    tiles.push({ image, bar, caption, figure });
  }
  $("empty").hidden = true;
  $("results").prepend(tag("div", { className: "group" }, title, list));
  while ($("results").children.length > KEPT_GROUPS) $("results").lastChild.remove();
  return { number: requests, title, tiles };
}

function show(group, event) {
  const tile = group.tiles[event.image_index];
  tile.image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  tile.image.hidden = false;
  const done = event.type === "image_generation.completed";
  tile.bar.value = done ? tile.bar.max : event.step;
  const name = event.class_label ? `${event.class_label}, ` : "";
  tile.caption.textContent = done ? `${name}seed ${event.seed}` : `step ${event.step} of ${event.steps}`;
  tile.image.alt = done ? `${name}seed ${event.seed}` : `Preview, step ${event.step} of ${event.steps}`;
}

// Events of a stream that was posted to; EventSource can only GET.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

function wishOf() {
  const wish = {
    prompt: "", n: Number($("count").value), num_inference_steps: Number($("steps").value), sampler: $("sampler").value,
    stream: true, partial_images: Math.min(PREVIEWS, model.max_previews, Math.max(0, Number($("steps").value) - 1)),
  };
  if ($("seed").value !== "") wish.seed = Number($("seed").value);
  if ($("label").value !== "") wish.class_label = Number($("label").value);
  if (model.guidance) wish.guidance_scale = Number($("guidance").value);
  return wish;
}

async function generate() {
  $("error").textContent = "";
  const wish = wishOf(), group = newGroup(wish), stop = new AbortController(), begun = performance.now();
  running.add(stop);
  $("stop").disabled = false;
  try {
    const answer = await fetch("/v1/images/generations", {
      method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(wish), signal: stop.signal,
    });
    if (!answer.ok) throw new Error(await messageOf(answer));
    let finished = 0;
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      show(group, event);
      finished += event.type === "image_generation.completed";
      group.title.textContent = `Request ${group.number}: denoising`;
    }
    if (finished < wish.n) throw new Error("the connection ended early");
    const seconds = ((performance.now() - begun) / 1000).toFixed(2);
    group.title.textContent = `Request ${group.number}: ${wish.n} image${wish.n === 1 ? "" : "s"}, ${wish.num_inference_steps} steps, ${wish.sampler}, ${seconds} s`;
    $("announce").textContent = `Request ${group.number} is done: ${finished} images.`;
  } catch (error) {
    const why = error.name === "AbortError" ? "stopped" : error.message;
    group.title.textContent = `Request ${group.number}: ${why}`;
    for (const tile of group.tiles) tile.figure.className = "failed";
    if (why !== "stopped") $("error").textContent = why;
  } finally {
    running.delete(stop);
    $("stop").disabled = running.size === 0;
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); if (model) generate(); });
$("stop").addEventListener("click", () => { for (const stop of running) stop.abort(); });
$("connect").addEventListener("click", () => { connect().catch((error) => { $("error").textContent = error.message; }); });
$("guidance").addEventListener("input", () => { $("guidance-value").textContent = $("guidance").value; });
watch();
