// Asks one server twice, plainly and with a method, and shows where each token came from.
"use strict";

const $ = (id) => document.getElementById(id);
const SHARED = "align_spec_strict";
const WITHOUT_LOGPROBS = new Set(["deal"]); // the method refuses them
// Whose report tells drafts from the target's own tokens. Until it comes, all tokens of an event but its last count as
// drafts; elsewhere nobody tells.
const DRAFTING = new Set(["wsd"]);
let methods = {};
let model = "";
let running = null; // AbortController of both requests

const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

async function ask(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw new Error(`${path}: ${response.status} ${(await response.text()).slice(0, 300)}`);
  return response.json();
}

function tell(node, text, wrong = false) {
  node.textContent = text;
  node.classList.toggle("wrong", wrong);
}

async function begin() {
  try {
    const [info, models] = [await ask("../v1/align_spec/info"), await ask("../v1/models")];
    if (!Object.keys(methods).length) {
      methods = info.methods;
      $("method").replaceChildren(...Object.keys(methods).map((name) => new Option(name)));
      showOptions();
    }
    model = models.data[0].id;
    tell($("state"), `${model}, vllm_align_spec ${info.version}${info.enabled ? "" : ", switched off"}`);
  } catch (error) {
    tell($("state"), `${error.message} – if it wants a key, enter it below`, true);
  }
}

// Options ------------------------------------------------------------------------------------------------------------

const alternatives = (schema) => (schema.anyOf || [schema]).filter((one) => one.type !== "null");

function field(name, schema, required) {
  const choice = alternatives(schema).find((one) => one.enum);
  const number = alternatives(schema).find((one) => one.type === "number" || one.type === "integer");
  let input;
  if (choice) {
    input = document.createElement("select");
    input.append(...(required ? [] : [new Option("(default)", "")]), ...choice.enum.map((one) => new Option(one)));
  } else {
    input = document.createElement("input");
    const list = alternatives(schema).some((one) => one.type === "array");
    input.type = number && !list ? "number" : "text";
    input.step = number && number.type === "integer" ? "1" : "any";
    if (number && number.minimum !== undefined) input.min = number.minimum;
    if (number && number.maximum !== undefined) input.max = number.maximum;
    const fallback = schema.default;
    input.placeholder = fallback === undefined || fallback === null || fallback.length === 0 ? "" : String(fallback);
    if (required && number) input.value = name === "bon" ? 4 : number.minimum ?? 0;
  }
  input.name = name;
  input.required = required;
  const label = document.createElement("label");
  label.title = schema.description || "";
  label.append(name, input);
  return label;
}

function showOptions() {
  const schema = methods[$("method").value];
  const own = Object.entries(schema.properties).filter(([name, one]) => name !== SHARED && one.const === undefined);
  const required = new Set(schema.required);
  $("options").querySelector(".row").replaceChildren(...own.map(([name, one]) => field(name, one, required.has(name))));
}

function chosenOptions() {
  const method = $("method").value;
  const { properties } = methods[method];
  const chosen = properties[method].const === undefined ? {} : { [method]: properties[method].const };
  for (const input of $("options").querySelectorAll("input, select")) {
    const text = input.value.trim();
    if (!text) continue;
    const kinds = alternatives(properties[input.name]).map((one) => one.type);
    const numeric = alternatives(properties[input.name]).some(
      (one) => ["number", "integer"].includes(one.type) || ["number", "integer"].includes(one.items?.type));
    const parts = kinds.includes("array") ? text.split(",").map((part) => part.trim()) : [text];
    const values = parts.map((part) => (numeric && part !== "" && !Number.isNaN(Number(part)) ? Number(part) : part));
    chosen[input.name] = values.length > 1 ? values : values[0];
  }
  return chosen;
}

// Running ------------------------------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function add(text, answer, token, shown, origin) {
  const span = document.createElement("span");
  span.className = `token ${origin}`;
  span.textContent = shown;
  Object.assign(token, { origin, place: answer.tokens.length });
  span.token = token;
  answer.tokens.push(token);
  answer.spans.push(span);
  text.append(span);
}

async function run(article, options, signal) {
  const text = article.querySelector(".text");
  const told = article.querySelector(".told");
  const answer = { tokens: [], spans: [], id: null, report: null };
  article.answer = answer;
  text.replaceChildren();
  tell(told, "waiting");
  const body = {
    model,
    messages: [{ role: "user", content: $("prompt").value }],
    stream: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max_tokens").value),
    seed: Number($("seed").value),
    logprobs: !(options && WITHOUT_LOGPROBS.has($("method").value)),
    ...($("grammar").value ? { structured_outputs: { regex: $("grammar").value } } : {}),
    ...(options ? { vllm_xargs: options } : {}),
  };
  const start = performance.now();
  let first = null;
  let finish = null;
  try {
    const response = await fetch("../v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body), signal,
    });
    if (!response.ok) {
      const said = await response.text();
      let message = said;
      try { message = JSON.parse(said).error.message; } catch { /* not JSON */ }
      throw new Error(`${response.status}: ${message}`);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      answer.id = event.id;
      const [choice] = event.choices;
      if (!choice) continue;
      const content = choice.delta.content || "";
      const tokens = choice.logprobs?.content ?? (content ? [{ token: content }] : []);
      if (tokens.length && first === null) first = performance.now() - start;
      // Together they show what was said: an end token has no text, and a character may be spread over tokens.
      let rest = content;
      tokens.forEach((token, i) => {
        const last = i + 1 === tokens.length;
        const shown = last ? rest : rest.startsWith(token.token) ? token.token : "";
        rest = rest.slice(shown.length);
        add(text, answer, { ...token }, shown, options && !last && DRAFTING.has($("method").value) ? "draft" : "base");
      });
      finish = choice.finish_reason || finish;
    }
    const seconds = (performance.now() - start) / 1000;
    const speed = (answer.tokens.length / seconds).toFixed(1);
    tell(told, `${answer.tokens.length} tokens in ${seconds.toFixed(2)} s (${speed}/s), first after ${((first ?? 0) / 1000).toFixed(2)} s; ended: ${finish}`);
    if (options) await explain(article, answer, signal);
  } catch (error) {
    tell(told, error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  }
}

// What the report adds: which tokens are the pilot's, and what was rejected before a segment was taken.
async function explain(article, answer, signal) {
  let report = null;
  for (let tries = 0; tries < 20 && report === null; tries += 1) {
    try {
      report = await ask(`../v1/align_spec/reports/${answer.id}`);
    } catch {
      await new Promise((later) => setTimeout(later, 150));
    }
  }
  if (report === null || signal.aborted) return;
  article.querySelector("pre").textContent = JSON.stringify(report, null, 1);
  const [choice] = report.choices;
  const mark = (place, origin, more) => {
    const token = answer.tokens[place];
    if (!token) return;
    Object.assign(token, more, { origin });
    answer.spans[place].className = `token ${origin}`;
  };
  let place = 0;
  for (const [origin, count] of choice.origins || []) {
    for (const end = place + count; place < end; place += 1) mark(place, origin, {});
  }
  place = 0;
  for (const segment of choice.segments || []) {
    for (let i = 0; i < segment.tokens; i += 1, place += 1) {
      mark(place, segment.tries > 1 ? "resampled" : "base", { reward: segment.reward, tries: segment.tries });
    }
  }
  if (choice.log_mass_at_root !== undefined && choice.log_mass_at_root !== null) {
    answer.tokens.forEach((token) => { token.mass = Math.exp(choice.log_mass_at_root); });
    const again = choice.attempts > 1;
    answer.tokens.forEach((_, i) => mark(i, again ? "resampled" : "base", { attempts: choice.attempts }));
  }
}

// Looking at a token -------------------------------------------------------------------------------------------------

function show(span) {
  const { token } = span;
  const parts = [`“${token.token}”`, `token ${token.place + 1}`, token.origin];
  if (token.logprob !== undefined) parts.push(`probability ${Math.exp(token.logprob).toPrecision(3)}`);
  if (token.reward !== undefined) parts.push(`reward ${token.reward.toPrecision(3)} (try ${token.tries})`);
  if (token.attempts !== undefined) parts.push(`attempt ${token.attempts}`);
  if (token.mass !== undefined) parts.push(`grammar's mass at most ${token.mass.toPrecision(3)}`);
  $("token").textContent = parts.join(" · ");
  document.querySelectorAll(".here").forEach((one) => one.classList.remove("here"));
  span.classList.add("here");
}

function look(event) {
  if (event.target.token) show(event.target);
}

function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const spans = event.currentTarget.closest("article").answer?.spans ?? [];
  if (!step || !spans.length) return;
  event.preventDefault();
  const here = spans.findIndex((span) => span.classList.contains("here"));
  show(spans[here < 0 ? 0 : Math.min(Math.max(here + step, 0), spans.length - 1)]);
}

async function submit(event) {
  event.preventDefault();
  running?.abort();
  const mine = (running = new AbortController());
  $("stop").disabled = false;
  $("aligned").querySelector("pre").textContent = "";
  // One after the other: side by side each would slow the other down.
  await run($("plain"), null, mine.signal);
  if (!mine.signal.aborted) await run($("aligned"), chosenOptions(), mine.signal);
  if (running === mine) {
    $("stop").disabled = true;
    running = null;
  }
}

$("form").addEventListener("submit", submit);
$("stop").addEventListener("click", () => running?.abort());
$("method").addEventListener("change", showOptions);
$("key").addEventListener("change", begin);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
for (const text of document.querySelectorAll(".text")) {
  text.addEventListener("mouseover", look);
  text.addEventListener("keydown", walk);
}
begin();
