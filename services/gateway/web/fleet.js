// The fleet and its GPUs, as two watches tell of them.
import { $, fill, gib, h, meter, notice, number, pill, round, seconds, share, spark, time } from "./page.js";
import { follow } from "./api.js";

const HISTORY = 120, rates = [];
let stop = null, fleet = null, gpus = new Map(), driver = null, nodes = [], drawn = 0;

/** Why workers are slow at present, by name. */
export const slow = () => new Map((fleet?.workers ?? []).map(one => [one.registration.worker_id, one.slow_reasons ?? []]));

/** Follows the mesh from now on; `linked` hears how the connection is. */
export function start(linked) {
  end();
  stop = new AbortController();
  const { signal } = stop;
  follow("/api/v1/workers:watch?interval_duration.nanos=500000000", {
    signal,
    heard: message => { fleet = message; count(); draw(); },
    state: (said, status) => {
      linked(said);
      const may = status === 401 ? "This key is not known." : status === 403 ? "The fleet is shown to admin keys." : said;
      notice($("fleet-notice"), said ? `${may}${status === 401 || status === 403 ? "" : " – trying again."}` : "");
    },
  });
  follow("/api/v1/gpus:watch", {
    signal,
    heard: (message, first) => {
      if (first) gpus.clear();
      driver = message.driver ?? driver;
      nodes = message.nodes ?? nodes;
      for (const gpu of message.gpus ?? []) gpus.set(gpu.uuid, gpu);
      for (const uuid of message.removed_uuids ?? []) gpus.delete(uuid);
      draw();
    },
    state: () => {},
  });
}

export function end() {
  stop?.abort();
  stop = null;
}

const rate = () => fleet.workers?.reduce((sum, one) => sum + (one.load?.output_tokens_per_second ?? 0), 0) ?? 0;

function count() {
  rates.push(rate());
  if (rates.length > HISTORY) rates.shift();
}

function draw() {
  // Two watches may speak at the same moment; one drawing a frame is enough.
  if (!fleet || drawn) return;
  drawn = requestAnimationFrame(() => {
    drawn = 0;
    const workers = (fleet.workers ?? []).map(seen), cards = [...gpus.values()].sort(order);
    tiles(workers);
    $("troubles").replaceChildren(...troubles(workers, cards).map(([bad, who, what]) =>
      h("li", bad ? "bad" : "", [h("strong", "", who), ` ${what}`])));
    const rank = one => one.out ? 0 : one.slow.length ? 1 : 2;
    fill($("workers").tBodies[0], [...workers].sort((one, other) => rank(one) - rank(other)).map(row));
    drawGpus(cards, workers);
    fill($("tenants").tBodies[0], (fleet.tenants ?? []).map(one => ({
      key: one.tenant_id, cells: [one.tenant_id, number(one.running_count ?? 0), number(one.waiting_count ?? 0)],
    })));
  });
}

const order = (one, other) => (one.node ?? "").localeCompare(other.node ?? "") || (one.index ?? 0) - (other.index ?? 0);

function seen(worker) {
  const said = worker.registration ?? {}, load = worker.load ?? {};
  return {
    name: said.worker_id ?? "", pool: said.pool ?? "", gpus: said.gpu_uuids ?? [],
    models: (load.models?.length ? load.models : said.models ?? []).map(model => model.name),
    out: worker.excluded_reason ?? "", why: load.state_reason ?? "", slow: worker.slow_reasons ?? [],
    slots: said.max_running_count ?? 0, leases: worker.lease_count ?? 0, running: load.running_count ?? 0, waiting: load.waiting_count ?? 0,
    kv: load.kv_usage_ratio ?? 0, rate: load.output_tokens_per_second ?? 0,
    step: load.decode_step_duration === undefined ? null : seconds(load.decode_step_duration),
    prefill: load.prefill_tokens_per_second ?? 0,
    cached: +load.prefix_query_token_count ? load.prefix_hit_token_count / load.prefix_query_token_count : null,
  };
}

function tiles(workers) {
  const ready = workers.filter(one => !one.out).length, streams = workers.reduce((sum, one) => sum + one.leases, 0);
  const made = [
    ["Workers ready", `${ready} of ${workers.length}`], ["Requests running", round(streams)],
    ["Requests waiting", round(fleet.waiting_count ?? 0)], ["Tokens a second", round(rate()), spark(rates)],
  ];
  $("tiles").replaceChildren(...made.map(([name, value, more]) =>
    h("div", "tile", [h("small", "", name), h("b", "", value), ...(more ? [more] : [])])));
}

function troubles(workers, cards) {
  const found = [];
  if (!workers.length) found.push([true, "Workers:", "none is registered"]);
  if (fleet.degradation_reason) found.push([true, "The mesh is degraded:", fleet.degradation_reason]);
  for (const one of workers) {
    const causes = cards.filter(gpu => uses(one, gpu)).map(gpu => gpu.health_reason || words(gpu.throttle_reasons)).filter(Boolean);
    const ofGpu = causes.length ? `; its GPU: ${causes.join("; ")}` : "";
    if (one.out) {
      found.push([true, one.name, `takes no work: ${one.out}${one.why ? ` (${one.why})` : ""}${ofGpu}`]);
      continue;
    }
    for (const reason of one.slow) found.push([false, one.name, `is slow: ${reason}${ofGpu}`]);
  }
  for (const node of nodes.length ? nodes : [{ driver }]) {
    if (node.away) found.push([true, `Machine ${node.name}:`, "its telemetry does not answer"]);
    if (node.driver?.state === "DRIVER_STATE_FAILED") found.push([true, `NVIDIA driver${node.name ? ` of ${node.name}` : ""}:`, node.driver.message ?? "it fails"]);
  }
  for (const gpu of cards) {
    if (health(gpu) !== "healthy") found.push([health(gpu) !== "degraded", `${label(gpu)}:`, `${health(gpu)}: ${gpu.health_reason ?? "for no known reason"}`]);
  }
  if (fleet.waiting_count) found.push([false, "Queue:", `${fleet.waiting_count} requests wait for a worker with room`]);
  return found;
}

function row(one) {
  const state = one.out ? pill(one.out, "bad") : one.slow.length ? pill("slow", "warn") : pill("ready", "good");
  state.title = one.out ? one.why : one.slow.join("\n");
  return {
    key: one.name,
    cells: [
      one.name, one.pool, one.models.join(", "), state,
      meter(one.running / (one.slots || 1), `${one.running}/${one.slots}${one.waiting ? ` +${one.waiting}` : ""}`, "slots in use"),
      meter(one.kv, share(one.kv), "KV cache in use"), number(round(one.rate)), number(time(one.step)),
      number(one.prefill ? `${round(one.prefill)}/s` : "–"), number(one.cached === null ? "–" : share(one.cached)),
      [...gpus.values()].filter(gpu => uses(one, gpu)).map(label).join(", ") || one.gpus.map(uuid => uuid.slice(0, 12)).join(", ") || "–",
    ],
  };
}

const uses = (worker, gpu) => [gpu, ...gpu.mig_instances ?? []].some(part => worker.gpus.includes(part.uuid));
const words = reasons => (reasons ?? []).join(", ").replaceAll("_", " ");
const health = gpu => (gpu.health ?? "").replace("GPU_HEALTH_", "").toLowerCase() || "unknown";
const label = gpu => `GPU ${gpu.node ? `${gpu.node}/` : ""}${gpu.index ?? 0}`;

function drawGpus(cards, workers) {
  if (!cards.length) {
    const state = driver?.state;
    $("gpus").replaceChildren(h("p", "quiet", state === "DRIVER_STATE_ABSENT" || !state ? "There is no NVIDIA GPU." : driver.message ?? "No GPU is told of."));
    return;
  }
  $("gpus").replaceChildren(...cards.map(gpu => {
    const users = workers.filter(one => uses(one, gpu)).map(one => one.name), well = health(gpu) === "healthy";
    const lines = [];
    const tell = (name, value) => lines.push(h("dt", "", name), h("dd", "", value));
    if (gpu.utilization_percent !== undefined) tell("Busy", meter(gpu.utilization_percent / 100, `${gpu.utilization_percent} %`, "busy", true));
    if (gpu.memory_total_bytes) {
      tell("Memory", meter((gpu.memory_used_bytes ?? 0) / gpu.memory_total_bytes, `${gib(gpu.memory_used_bytes ?? 0)}/${gib(gpu.memory_total_bytes)} GiB`, "memory in use"));
    }
    if (gpu.temperature_celsius !== undefined) tell("Temperature", `${gpu.temperature_celsius} °C`);
    if (gpu.power_watts !== undefined) tell("Power", `${round(gpu.power_watts)}${gpu.power_limit_watts ? ` of ${round(gpu.power_limit_watts)}` : ""} W`);
    if (gpu.throttle_reasons?.length) tell("Held down by", words(gpu.throttle_reasons));
    for (const part of gpu.mig_instances ?? []) {
      const used = part.memory_total_bytes ? `${gib(part.memory_used_bytes ?? 0)}/${gib(part.memory_total_bytes)} GiB` : "";
      tell(part.name || "Instance", used);
    }
    const event = gpu.recent_events?.at(-1);
    if (event) tell("Last event", `${new Date(event.time).toLocaleTimeString("en-GB")} ${event.message ?? ""}`);
    if (users.length) tell("Workers", users.join(", "));
    return h("div", "gpu", [h("p", "", [h("strong", "", `${label(gpu)} `), pill(health(gpu), well ? "good" : health(gpu) === "degraded" ? "warn" : "bad")]),
      h("p", "quiet", gpu.name ?? ""), h("dl", "", lines)]);
  }));
}
