// The page: one conversation, kept in this browser, with a model on the server the page came from.

import { answer, models } from "./api.js";
import { copy, make, render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const ENDS = {
  length: "Ended at the limit of tokens.",
  stopped: "Stopped.",
  unfinished: "Not finished.",
  error: "Ended by an error of the model.",
  abort: "Ended by the server.",
  insufficient_system_resource: "Ended by the server, which has too much to do.",
};

// messages: {role, content} of the user, {role, content, reasoning, end, figures} of the assistant
let messages = recall("localStorage", "dsv3.messages", []);
if (messages.at(-1)?.end === "unfinished" && isEmpty(messages.at(-1))) messages.pop(); // closed before it came
let settings = { system: "", temperature: "0.6", top_p: "0.95", top_k: "", max_tokens: "512", seed: "",
  plain: false, open: false, model: "", ...recall("localStorage", "dsv3.settings", {}) };
let key = recall("sessionStorage", "dsv3.key", "");
let running = null; // the AbortController of the answer being written
let askAgain = false; // once there is a key

function recall(storage, name, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(name)) ?? otherwise;
  } catch { // no storage is allowed, or what is there is not ours
    return otherwise;
  }
}

function keep(storage, name, value) {
  try {
    window[storage].setItem(name, JSON.stringify(value));
  } catch {
    tell("This browser keeps no more: the conversation is lost when the page closes.");
  }
}

const keepMessages = () => keep("localStorage", "dsv3.messages", messages);
const keepSettings = () => keep("localStorage", "dsv3.settings", settings);

function isEmpty(message) {
  return !message.content && !message.reasoning;
}

// Showing

function tell(text) {
  $("status").textContent = text;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function show() {
  document.body.classList.toggle("plain", settings.plain);
  $("messages").replaceChildren(...messages.map((message) => {
    const node = make("article", "message " + message.role);
    node.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
    if (message.role === "user") node.textContent = message.content;
    else fill(node, message);
    return node;
  }));
  below();
}

// Bring an answer's node up to date with what has been heard of it.
function fill(node, message) {
  if (!node.firstChild) {
    const reasoning = make("details", "reasoning");
    reasoning.append(make("summary"), make("div"));
    node.append(reasoning, make("p", "waiting", "…"), make("div", "text"), make("p", "note"));
  }
  const [reasoning, waiting, text, note] = node.children;
  const writing = running && message === messages.at(-1);
  reasoning.hidden = !message.reasoning;
  reasoning.firstChild.textContent = writing && !message.content ? "Reasoning …" : "Reasoning";
  render(reasoning.lastChild, message.reasoning, settings.plain);
  waiting.hidden = !writing || !isEmpty(message);
  render(text, message.content, settings.plain);
  note.textContent = (!writing && ENDS[message.end]) || "";
  note.hidden = !note.textContent;
}

// What stands below the last message: its buttons and figures.
function below() {
  const last = messages.at(-1);
  const answered = last?.role === "assistant";
  $("empty").hidden = Boolean(last);
  $("below").hidden = !last && $("error").hidden;
  $("actions").hidden = !last || Boolean(running);
  $("regenerate").textContent = answered ? "Regenerate" : "Answer";
  $("copy").hidden = !answered || !last.content;
  const figures = (answered && !running && last.figures) || [];
  $("meter").hidden = !figures.length;
  $("meter").replaceChildren(...figures.map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", value));
    return pair;
  }));
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("messages").setAttribute("aria-busy", String(Boolean(running)));
}

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

// Asking

function ask(text) {
  messages.push({ role: "user", content: text });
  keepMessages();
  reply();
}

// Answer the last message of the user, in place of an earlier answer.
async function reply() {
  if (running || !numbersAreGood()) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  const message = { role: "assistant", content: "", reasoning: "", end: "unfinished", figures: [] };
  const body = request();
  const asked = key;
  let again = false;
  messages.push(message);
  running = new AbortController();
  fail("");
  show();
  toEnd();
  const started = performance.now();
  let first = 0, last = 0, usage = null, drawn = 0, kept = started;
  const draw = () => {
    drawn = 0;
    const follow = atEnd();
    fill($("messages").lastElementChild, message);
    if (follow) toEnd();
    if (performance.now() - kept > 1000) {
      kept = performance.now();
      keepMessages();
    }
  };
  const clock = setInterval(() => tell(`Answering, ${((performance.now() - started) / 1000).toFixed(0)} s`), 1000);
  tell("Answering");
  try {
    await answer(body, asked, running.signal, (part) => {
      if (part.content || part.reasoning) {
        last = performance.now();
        first ||= last;
        message.content += part.content;
        message.reasoning += part.reasoning;
        drawn ||= requestAnimationFrame(draw);
      }
      if (part.finish) message.end = part.finish;
      usage = part.usage || usage;
    });
    message.figures = figures(usage, first - started, last - first);
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    else if (error.status === 401 && asked !== key) again = true; // another key was given meanwhile
    else failed(error, true);
  }
  clearInterval(clock);
  cancelAnimationFrame(drawn);
  running = null;
  tell("");
  if (message === messages.at(-1)) { // not so after New chat
    const follow = atEnd();
    if (message.end === "unfinished" && isEmpty(message)) {
      messages.pop(); // the question stands, to be asked again
      $("messages").lastElementChild.remove();
    } else fill($("messages").lastElementChild, message);
    keepMessages();
    below();
    if (follow) toEnd();
    if (again) reply();
  } else below();
}

function request() {
  const body = { messages: messages.filter((message) => message.content).map(({ role, content }) => ({ role, content })) };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  if (settings.model) body.model = settings.model;
  for (const name of NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
  return body;
}

function numbersAreGood() {
  const bad = NUMBERS.map($).find((field) => !field.checkValidity());
  if (!bad) return true;
  openSettings(true);
  fail(`${$("settings").querySelector(`[for=${bad.id}]`).textContent}: ${bad.validationMessage}`);
  below();
  bad.reportValidity(); // on a phone the settings cover the line above
  return false;
}

function failed(error, again) {
  console.error(error);
  const locked = error.status === 401;
  fail(locked ? (key ? "The server does not know this key." : "") : error.message);
  if (locked) {
    askAgain ||= again;
    $("key-form").hidden = false;
    $("key").focus();
  }
  below();
}

// Milliseconds to the first text and from there to the last; the first piece is not counted in the rate.
function figures(usage, wait, writing) {
  const all = [];
  const tokens = usage?.completion_tokens || 0;
  if (tokens > 1 && writing > 0) all.push(["Speed", `${Number(((tokens - 1) / writing * 1000).toPrecision(3))} tokens/s`]);
  if (wait > 0) all.push(["First text after", `${(wait / 1000).toFixed(2)} s`]);
  if (!usage) return all;
  const { accepted_prediction_tokens: good = 0, rejected_prediction_tokens: bad = 0, reasoning_tokens: thought = 0 } =
    usage.completion_tokens_details || {};
  all.push(["Answer", `${tokens} tokens${thought ? `, ${thought} of them reasoning` : ""}`]);
  if (good + bad) all.push(["MTP drafts accepted", `${good} of ${good + bad}, ${Math.round(100 * good / (good + bad))} %`]);
  const hit = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
  all.push(["Prompt from cache", `${hit} of ${usage.prompt_tokens} tokens`]);
  return all;
}

// Controls

function openSettings(open) {
  settings.open = open;
  keepSettings();
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
}

async function listModels() {
  const asked = key;
  try {
    const names = await models(asked);
    if (!names.includes(settings.model)) settings.model = names[0] || "";
    $("model").replaceChildren(...names.map((name) => make("option", "", name)));
    $("model").value = settings.model;
    $("model").hidden = names.length < 2;
    $("model-name").textContent = names.length === 1 ? names[0] : "";
  } catch (error) {
    if (asked === key) failed(error, false); // else a later listing answers for the key given since
  }
}

function fit() {
  $("input").style.height = "auto";
  $("input").style.height = $("input").scrollHeight + 2 + "px";
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim() || !numbersAreGood()) return;
  $("input").value = "";
  fit();
  ask(text);
});
$("input").addEventListener("input", fit);
$("input").addEventListener("keydown", (event) => {
  // On a touch screen Enter begins a line: there is no Shift to hold.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("input").focus();
});
$("regenerate").addEventListener("click", reply);
$("copy").addEventListener("click", async () => {
  tell(await copy(messages.at(-1).content) ? "Copied." : "The browser does not allow copying.");
});
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  keepMessages();
  fail("");
  tell("");
  show();
  $("input").focus();
});
$("settings-button").addEventListener("click", () => openSettings($("settings").hidden));
$("settings-close").addEventListener("click", () => openSettings(false));
$("settings").addEventListener("input", (event) => {
  const field = event.target;
  settings[field.id] = field.type === "checkbox" ? field.checked : field.value;
  keepSettings();
  if (field.id === "plain") show();
});
$("model").addEventListener("change", () => {
  settings.model = $("model").value;
  keepSettings();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  keep("sessionStorage", "dsv3.key", key);
  $("key").value = "";
  $("key-form").hidden = true;
  fail("");
  listModels();
  if (askAgain) reply();
  askAgain = false;
});
window.addEventListener("pagehide", keepMessages);

for (const name of ["system", ...NUMBERS]) $(name).value = settings[name];
$("plain").checked = settings.plain;
openSettings(settings.open && matchMedia("(min-width: 44.01rem)").matches);
show();
toEnd();
listModels();
