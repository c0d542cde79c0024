// Peer: fastify verifies a callback and adds it to a BullMQ queue (Redis); a BullMQ worker posts it to the hook, with
// retries. Run both: `node fastify_bullmq.cjs receive PORT` and `... work`. BullMQ knows a callback that comes again by
// its job id, for as long as it keeps the ended job (an hour).
const crypto = require("node:crypto");

const { REDIS_URL, HOOK_URL, HOOK_SECRET, CONCURRENCY } = process.env;
const QUEUE = "callbacks";
const KEY = Buffer.from(HOOK_SECRET.slice("whsec_".length), "base64");
const TOLERANCE_S = 300;
const redis = new URL(REDIS_URL);
const connection = { host: redis.hostname, port: Number(redis.port), maxRetriesPerRequest: null };

function signature(id, timestamp, body) {
  return "v1," + crypto.createHmac("sha256", KEY).update(`${id}.${timestamp}.`).update(body).digest("base64");
}

function isSigned(headers, body) {
  const timestamp = headers["webhook-timestamp"];
  if (!(Math.abs(Date.now() / 1000 - Number(timestamp)) <= TOLERANCE_S)) return false;
  const expected = Buffer.from(signature(headers["webhook-id"], timestamp, body));
  const given = Buffer.from(headers["webhook-signature"] ?? "");
  return given.length === expected.length && crypto.timingSafeEqual(given, expected);
}

async function receive(port) {
  const { Queue } = require("bullmq");
  const queue = new Queue(QUEUE, {
    connection,
    defaultJobOptions: {
      attempts: 8,
      backoff: { type: "exponential", delay: 1000 },
      removeOnComplete: { age: 3600 },
    },
  });
  const app = require("fastify")();
  app.addContentTypeParser("application/json", { parseAs: "buffer" }, (request, body, done) => done(null, body));
  app.post("/hooks/kling", async (request, reply) => {
    if (!isSigned(request.headers, request.body)) return reply.code(401).send();
    const id = request.headers["webhook-id"];
    await queue.add("deliver", request.body.toString(), { jobId: id }); // answered once Redis has it
    return reply.code(200).send();
  });
  await app.listen({ host: "127.0.0.1", port });
}

function work() {
  const { Worker } = require("bullmq");
  const { Agent, request } = require("undici");
  const concurrency = Number(CONCURRENCY);
  const dispatcher = new Agent({ connections: concurrency, headersTimeout: 10_000, bodyTimeout: 10_000 });
  new Worker(
    QUEUE,
    async (job) => {
      const timestamp = String(Math.floor(Date.now() / 1000));
      const response = await request(HOOK_URL, {
        method: "POST",
        dispatcher,
        body: job.data,
        headers: {
          "content-type": "application/json",
          "webhook-id": job.id,
          "webhook-timestamp": timestamp,
          "webhook-signature": signature(job.id, timestamp, job.data),
        },
      });
      await response.body.dump();
      if (response.statusCode >= 300) throw new Error(`the hook answered ${response.statusCode}`);
    },
    { connection, concurrency },
  );
}

if (process.argv[2] === "work") work();
else receive(Number(process.argv[3]));
