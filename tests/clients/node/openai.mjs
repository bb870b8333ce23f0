// The official SDK for JavaScript: `node tests/clients/node/openai.mjs`.

import OpenAI, { toFile } from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CHAT, PARAMETERS, QUESTION, THINKING, attempts, serve } from "./loop.mjs";

const Weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.literal([1, 2, 3]) });
const TOOLS = [
  { type: "function", function: { name: "get_weather", description: "The weather somewhere.", parameters: PARAMETERS } },
];
const NAMED = { type: "function", function: { name: "get_weather" } };
const LONG = { max_tokens: 1900, ignore_eos: true };

const client = (target, options = {}) =>
  new OpenAI({ baseURL: `${target.url}/v1`, apiKey: target.key, maxRetries: 0, ...options });
const body = (fields = {}) => ({ model: "demo", messages: CHAT, max_tokens: 12, temperature: 0, ...fields });
const ask = (target, fields) => client(target).chat.completions.create(body(fields));
const used = (usage) => [usage.prompt_tokens, usage.completion_tokens];
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

async function chat(target) {
  const { choices, usage } = await ask(target);
  return { text: choices[0].message.content, finish: choices[0].finish_reason, usage: used(usage) };
}

async function stream(target) {
  const chunks = [];
  for await (const chunk of await ask(target, { stream: true, stream_options: { include_usage: true } })) {
    chunks.push(chunk);
  }
  const choices = chunks.filter((chunk) => chunk.choices.length).map((chunk) => chunk.choices[0]);
  return {
    pieces: choices.map((choice) => choice.delta.content).filter(Boolean),
    finish: choices.at(-1).finish_reason,
    usage: used(chunks.at(-1).usage),
  };
}

async function tools(target) {
  let streamed = false;
  const running = client(target).chat.completions.stream(body({ max_tokens: 80, tools: TOOLS, tool_choice: NAMED }));
  running.on("tool_calls.function.arguments.delta", () => (streamed = true));
  const { message } = (await running.finalChatCompletion()).choices[0];
  const { id, function: called } = message.tool_calls[0];
  const { name, arguments: given } = called;
  const said = {
    role: "assistant",
    content: message.content,
    tool_calls: [{ id, type: "function", function: { name, arguments: given } }],
  };
  const result = { role: "tool", tool_call_id: id, content: "Sunny." };
  const after = await ask(target, { messages: [...CHAT, said, result], tools: TOOLS, tool_choice: "none" });
  return { name, arguments: JSON.parse(given), streamed, after: after.choices[0].message.content };
}

async function structured(target) {
  const format = zodResponseFormat(Weather, "weather");
  const answer = await client(target).chat.completions.parse(body({ max_tokens: 80, response_format: format }));
  return answer.choices[0].message.parsed;
}

async function embeddings(target) {
  const answer = await client(target).embeddings.create({ model: "demo-embed", input: ["one", "two two", "three"] });
  return { vectors: answer.data.map((entry) => entry.embedding) };
}

async function failure(target, fields = {}) {
  try {
    await ask(target, fields);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return {
      class: error.constructor.name,
      status: error.status,
      code: error.code,
      param: error.param,
      message: error.message,
      request_id: Boolean(error.requestID),
    };
  }
  throw new Error("no error");
}

const bad_key = (target) => failure({ ...target, key: "tl-nobody" });
const unknown_model = (target) => failure(target, { model: "nothing" });
const bad_field = (target) => failure(target, { temperature: 7 });
const too_long = (target) => failure(target, { messages: [{ role: "user", content: "word ".repeat(5000) }] });
const stream_error = (target) => failure(target, { stream: true, top_p: 3 });

async function busy(target) {
  const limited = { ...target, key: target.limited_key };
  const held = await ask(limited, { stream: true, ...LONG });
  const { seen, fetch } = attempts(() => held.controller.abort());
  await client(limited, { maxRetries: 4, fetch }).completions.create({ model: "demo", prompt: "Hi", max_tokens: 2 });
  return seen;
}

async function outage(target) {
  const { seen, fetch } = attempts();
  const trying = client(target, { maxRetries: 20, fetch });
  const answer = await trying.completions.create({ model: "demo", prompt: "Hi", max_tokens: 2 });
  return { ...seen, text: answer.choices[0].text };
}

async function cancel(target) {
  const started = performance.now();
  let pieces = 0;
  for await (const _ of await ask(target, { stream: true, ...LONG })) {
    pieces += 1;
    // Leaving the loop aborts the request.
    if (pieces === 5) break;
  }
  return { pieces, seconds: (performance.now() - started) / 1000 };
}

async function responses(target) {
  const api = client(target).responses;
  const fields = { model: "demo", max_output_tokens: 12, temperature: 0 };
  const first = await api.create({ input: QUESTION, ...fields });
  let [text, final, firstEvent] = ["", null, null];
  for await (const event of await api.create({ input: QUESTION, stream: true, ...fields })) {
    firstEvent ??= event.type;
    if (event.type === "response.output_text.delta") text += event.delta;
    if (["response.completed", "response.incomplete"].includes(event.type)) final = event.response;
  }
  const second = await api.create({ input: "And tomorrow?", previous_response_id: first.id, ...fields });
  const more = { ...fields, max_output_tokens: 80 };
  const tool = { type: "function", name: "get_weather", parameters: PARAMETERS, strict: true };
  const named = { type: "function", name: "get_weather" };
  const called = (await api.create({ input: QUESTION, ...more, tools: [tool], tool_choice: named })).output[0];
  const result = { type: "function_call_output", call_id: called.call_id, output: "Sunny." };
  const after = await api.create({ input: [{ role: "user", content: QUESTION }, called, result], ...fields });
  const parsed = await api.parse({ input: QUESTION, ...more, text: { format: zodTextFormat(Weather, "weather") } });
  return {
    text: first.output_text,
    streamed: text,
    final: final.output.map((item) => item.content.map((part) => part.text).join("")).join(""),
    first_event: firstEvent,
    input_tokens: [first.usage.input_tokens, second.usage.input_tokens],
    arguments: JSON.parse(called.arguments),
    after: after.output_text,
    parsed: parsed.output_parsed,
  };
}

async function batch(target) {
  const url = "/v1/chat/completions";
  const lines = [0, 1, 2].map((i) => JSON.stringify({ custom_id: `line-${i}`, method: "POST", url, body: body() }));
  const api = client(target);
  const file = await api.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch" });
  let made = await api.batches.create({ input_file_id: file.id, endpoint: url, completion_window: "24h" });
  const until = performance.now() + 30_000;
  while (!["completed", "failed", "expired", "cancelled"].includes(made.status) && performance.now() < until) {
    await sleep(0.1);
    made = await api.batches.retrieve(made.id);
  }
  const text = await (await api.files.content(made.output_file_id)).text();
  const answers = text.trim().split("\n").map((line) => JSON.parse(line));
  return {
    status: made.status,
    counts: made.request_counts,
    ids: answers.map((answer) => answer.custom_id).sort(),
    texts: answers.map((answer) => answer.response.body.choices[0].message.content),
    deleted: (await api.files.delete(file.id)).deleted,
  };
}

async function logprobs(target) {
  const { content } = (await ask(target, { logprobs: true, top_logprobs: 2 })).choices[0].logprobs;
  return {
    text: content.map((entry) => entry.token).join(""),
    logprobs: content.map((entry) => entry.logprob),
    alternatives: content.map((entry) => entry.top_logprobs.length),
  };
}

async function several_choices(target) {
  const { choices } = await ask(target, { n: 3, temperature: 1 });
  return { texts: choices.map((choice) => choice.message.content) };
}

async function several_prompts(target) {
  const fields = { model: "demo", prompt: ["One", "Two"], max_tokens: 5, temperature: 0 };
  const { choices } = await client(target).completions.create(fields);
  return { texts: choices.sort((a, b) => a.index - b.index).map((choice) => choice.text) };
}

async function reasoning(target) {
  const { message } = (await ask(target, { max_tokens: 100, ...THINKING })).choices[0];
  let streamed = "";
  for await (const chunk of await ask(target, { max_tokens: 100, stream: true, ...THINKING })) {
    streamed += chunk.choices[0]?.delta.reasoning_content ?? "";
  }
  return { reasoning: message.reasoning_content, content: message.content, streamed };
}

async function models(target) {
  const ids = [];
  for await (const model of client(target).models.list()) ids.push(model.id);
  return { ids, one: (await client(target).models.retrieve("demo")).id };
}

await serve({
  ...{ chat, stream, tools, structured, embeddings, bad_key, unknown_model, bad_field, too_long, stream_error, busy },
  ...{ outage, cancel, responses, batch, logprobs, several_choices, several_prompts, reasoning, models },
});
