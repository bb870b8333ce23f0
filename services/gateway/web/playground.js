// A conversation with a model, streamed over the OpenAI API.
import { $, h, time } from "./page.js";
import { ask, events, json } from "./api.js";

const said = [];
let running = null;

export async function models() {
  const list = (await json("/v1/models")).data.map(model => model.id), chosen = $("model").value;
  $("model").replaceChildren(...list.map(id => h("option", "", id, { value: id })));
  if (list.includes(chosen)) $("model").value = chosen;
}

export function wire() {
  $("ask").addEventListener("submit", event => { event.preventDefault(); send(); });
  $("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("playground").addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => { running?.abort(); said.length = 0; $("talk").replaceChildren(); $("prompt").focus(); });
}

function bubble(role, text) {
  const content = h("pre", "", text), under = h("small"), whole = h("article", `said ${role}`, [content, under]);
  whole.setAttribute("aria-label", role === "user" ? "You" : "The model");
  $("talk").append(whole);
  $("talk").scrollTop = $("talk").scrollHeight;
  return { whole, content, under };
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  running = new AbortController();
  $("prompt").value = "";
  $("send").disabled = !($("stop").disabled = false);
  said.push({ role: "user", content: text });
  bubble("user", text);
  const shown = bubble("assistant", ""), began = performance.now();
  const answer = { text: "", thought: "", first: null, tokens: 0, id: "" };
  try {
    await stream(answer, shown, began);
    said.push({ role: "assistant", content: answer.text });
  } catch (error) {
    // What was left unanswered is not said again with the next message.
    if (answer.text) said.push({ role: "assistant", content: answer.text });
    else said.pop();
    shown.whole.classList.toggle("failed", error.name !== "AbortError");
    tell(shown, answer, began, error.name === "AbortError" ? "stopped" : error.message);
  } finally {
    running = null;
    $("send").disabled = !($("stop").disabled = true);
  }
}

function request() {
  const system = $("system").value.trim(), body = {
    model: $("model").value, stream: true, stream_options: { include_usage: true },
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
  };
  if ($("max-tokens").value) body.max_tokens = +$("max-tokens").value;
  if ($("temperature").value !== "") body.temperature = +$("temperature").value;
  return body;
}

async function stream(answer, shown, began) {
  const { signal } = running;
  const got = await ask("/v1/chat/completions", { body: request(), headers: { "x-queue-status": "1" }, signal });
  answer.id = got.headers.get("x-request-id") ?? "";
  answer.worker = got.headers.get("x-tokenloom-worker") ?? "";
  let ended = false;
  for await (const { data, comment } of events(got)) {
    if (comment?.startsWith("queued")) shown.under.textContent = `waiting: ${comment}`;
    if (!data) continue;
    if (data === "[DONE]") { ended = true; break; }
    take(JSON.parse(data), answer, shown, began);
  }
  if (!ended) throw new Error("the answer broke off");
  tell(shown, answer, began, answer.reason === "length" ? "cut at the most tokens" : "");
}

function take(chunk, answer, shown, began) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices?.[0], more = choice?.delta?.content ?? "", thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
  answer.reason = choice?.finish_reason ?? answer.reason;
  if (!more && !thought) return;
  answer.first ??= performance.now() - began;
  if (thought) {
    answer.node ??= shown.content.insertAdjacentElement("beforebegin", h("pre", "thought"));
    answer.node.append(thought);
  }
  const log = $("talk"), follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  shown.content.append(answer.text ? more : more.trimStart());
  answer.text += more;
  if (follows) log.scrollTop = log.scrollHeight;
}

function tell(shown, answer, began, note) {
  const all = performance.now() - began, parts = [];
  if (note) parts.push(note);
  if (answer.first !== null) parts.push(`first token after ${time(answer.first / 1000)}`);
  if (answer.tokens > 1) parts.push(`${answer.tokens} tokens, ${(1000 * (answer.tokens - 1) / (all - answer.first)).toFixed(1)} a second`);
  if (answer.worker) parts.push(answer.worker);
  shown.under.replaceChildren(parts.join(" · "));
  if (answer.id) shown.under.append(" · ", h("a", "", "where its time went", { href: `#/requests/${encodeURIComponent(answer.id)}` }));
}
