// Vercel's AI SDK, with its OpenAI and its OpenAI-compatible provider: `node tests/clients/node/vercel.mjs`.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embedMany, generateText, jsonSchema, streamText, tool } from "ai";
import { z } from "zod";
import { PARAMETERS, QUESTION, THINKING, attempts, only, serve } from "./loop.mjs";

const Weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.literal([1, 2, 3]) });
const TOOL = { description: "The weather somewhere.", inputSchema: jsonSchema(PARAMETERS) };

const openai = (target, options = {}) => createOpenAI({ baseURL: `${target.url}/v1`, apiKey: target.key, ...options });
const compatible = (target, options = {}) =>
  createOpenAICompatible({
    ...{ name: "tokenloom", baseURL: `${target.url}/v1`, apiKey: target.key, includeUsage: true },
    supportsStructuredOutputs: true,
    ...options,
  });
const asked = (target, fields = {}) => ({
  ...{ model: compatible(target)("demo"), prompt: QUESTION, maxOutputTokens: 12, temperature: 0, maxRetries: 0 },
  // Else it is printed, too.
  ...{ onError: () => {} },
  ...fields,
});
const used = (usage) => [usage.inputTokens, usage.outputTokens];

async function chat(target) {
  const answer = await generateText(asked(target));
  return { text: answer.text, finish: answer.finishReason, usage: used(answer.usage) };
}

async function stream(target) {
  const running = streamText(asked(target));
  const pieces = [];
  for await (const piece of running.textStream) pieces.push(piece);
  return { pieces, finish: await running.finishReason, usage: used(await running.usage) };
}

async function tools(target) {
  const fields = { maxOutputTokens: 80, tools: { get_weather: tool(TOOL) } };
  const choice = { toolChoice: { type: "tool", toolName: "get_weather" } };
  const running = streamText(asked(target, { ...fields, ...choice }));
  let streamed = false;
  for await (const part of running.fullStream) if (part.type === "tool-input-delta") streamed = true;
  const call = only(await running.toolCalls);
  const result = { type: "tool-result", toolCallId: call.toolCallId, toolName: call.toolName };
  const messages = [
    { role: "user", content: QUESTION },
    ...(await running.response).messages,
    { role: "tool", content: [{ ...result, output: { type: "text", value: "Sunny." } }] },
  ];
  const more = { prompt: undefined, messages, toolChoice: "none", maxOutputTokens: 12 };
  const after = await generateText(asked(target, { ...fields, ...more }));
  return { name: call.toolName, arguments: call.input, streamed, after: after.text };
}

async function structured(target) {
  const output = Output.object({ schema: Weather });
  return (await generateText(asked(target, { output, maxOutputTokens: 80 }))).output;
}

async function embeddings(target) {
  const model = compatible(target).embeddingModel("demo-embed");
  return { vectors: (await embedMany({ model, values: ["one", "two two", "three"], maxRetries: 0 })).embeddings };
}

async function failure(target, fields = {}) {
  try {
    await generateText(asked(target, fields));
  } catch (error) {
    return told(error);
  }
  throw new Error("no error");
}

function told(error) {
  if (!APICallError.isInstance(error)) throw error;
  const { code, param } = error.data.error;
  const seen = { class: error.name, status: error.statusCode, code, param, message: error.message };
  return { ...seen, request_id: Boolean(error.responseHeaders["x-request-id"]), retryable: error.isRetryable };
}

const bad_key = (target) => failure({ ...target, key: "tl-nobody" });
const unknown_model = (target) => failure(target, { model: compatible(target)("nothing") });
const bad_field = (target) => failure(target, { temperature: 7 });
const too_long = (target) => failure(target, { prompt: "word ".repeat(5000) });

async function stream_error(target) {
  let told_ = null;
  const running = streamText(asked(target, { topP: 3, onError: ({ error }) => (told_ = told(error)) }));
  await running.consumeStream();
  return told_;
}

async function busy(target) {
  const limited = { ...target, key: target.limited_key };
  const leaving = new AbortController();
  const long = { maxOutputTokens: 1900, providerOptions: { tokenloom: { ignore_eos: true } } };
  const held = streamText(asked(limited, { ...long, abortSignal: leaving.signal })).textStream[Symbol.asyncIterator]();
  await held.next();
  const { seen, fetch } = attempts(() => leaving.abort());
  const model = compatible(limited, { fetch })("demo");
  await generateText(asked(limited, { model, maxOutputTokens: 2, maxRetries: 4 }));
  return seen;
}

async function outage(target) {
  const { seen, fetch } = attempts();
  const model = compatible(target, { fetch })("demo");
  const answer = await generateText(asked(target, { model, maxRetries: 20 }));
  return { ...seen, text: answer.text };
}

async function cancel(target) {
  const started = performance.now();
  const leaving = new AbortController();
  const long = { maxOutputTokens: 1900, providerOptions: { tokenloom: { ignore_eos: true } } };
  let pieces = 0;
  for await (const _ of streamText(asked(target, { ...long, abortSignal: leaving.signal })).textStream) {
    pieces += 1;
    if (pieces === 5) leaving.abort();
  }
  return { pieces: Math.min(pieces, 5), seconds: (performance.now() - started) / 1000 };
}

async function responses(target) {
  // What the OpenAI provider does by default.
  const model = openai(target)("demo");
  const first = await generateText(asked(target, { model }));
  const running = streamText(asked(target, { model }));
  let text = "";
  for await (const piece of running.textStream) text += piece;
  const previous = { openai: { previousResponseId: first.providerMetadata.openai.responseId } };
  const second = await generateText(asked(target, { model, prompt: "And tomorrow?", providerOptions: previous }));
  const fields = { model, maxOutputTokens: 80, tools: { get_weather: tool(TOOL) } };
  const choice = { toolChoice: { type: "tool", toolName: "get_weather" } };
  const called = await generateText(asked(target, { ...fields, ...choice }));
  const call = only(called.toolCalls);
  const result = { type: "tool-result", toolCallId: call.toolCallId, toolName: call.toolName };
  const messages = [
    { role: "user", content: QUESTION },
    ...called.response.messages,
    { role: "tool", content: [{ ...result, output: { type: "text", value: "Sunny." } }] },
  ];
  const after = await generateText(asked(target, { model, prompt: undefined, messages }));
  const output = Output.object({ schema: Weather });
  const parsed = await generateText(asked(target, { model, output, maxOutputTokens: 80 }));
  return {
    ...{ text: first.text, streamed: text, final: await running.text },
    input_tokens: [first.usage.inputTokens, second.usage.inputTokens],
    arguments: call.input,
    after: after.text,
    parsed: parsed.output,
  };
}

async function logprobs(target) {
  const providerOptions = { openai: { logprobs: 2 } };
  const answer = await generateText(asked(target, { model: openai(target).chat("demo"), providerOptions }));
  const content = answer.providerMetadata.openai.logprobs;
  return {
    text: content.map((entry) => entry.token).join(""),
    logprobs: content.map((entry) => entry.logprob),
    alternatives: content.map((entry) => entry.top_logprobs.length),
  };
}

async function reasoning(target) {
  const more = { maxOutputTokens: 100, providerOptions: { tokenloom: THINKING } };
  const answer = await generateText(asked(target, more));
  let streamed = "";
  for await (const part of streamText(asked(target, more)).fullStream) {
    if (part.type === "reasoning-delta") streamed += part.text;
  }
  return { reasoning: answer.reasoningText, content: answer.text, streamed };
}

await serve({
  ...{ chat, stream, tools, structured, embeddings, bad_key, unknown_model, bad_field, too_long, stream_error, busy },
  ...{ outage, cancel, responses, logprobs, reasoning },
});
