// Drives the sandbox as a third-party client of Kling does: the npm package `kling-api`, which speaks Kling's API v1.
// Reads {url, accessKey, secretKey, body} as JSON from standard input; prints what the client got as JSON.
import { readFileSync } from "node:fs";
import { KlingAPI, KlingAPIError } from "kling-api";

const { url, accessKey, secretKey, body } = JSON.parse(readFileSync(0, "utf8"));
const api = new KlingAPI({ accessKey, secretKey, baseUrl: url });
const path = "/v1/videos/motion-control";
const query = (id) => api.httpClient.request("GET", `${path}/${id}`);

// Returns the error that a call ends in, as the client reports it.
async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof KlingAPIError)) throw error;
    return { code: error.code, status: error.httpStatus, message: error.message, requestId: error.requestId };
  }
  throw new Error("the call did not fail");
}

const created = await api.httpClient.request("POST", path, body);
const id = created.data.task_id;
const ended = await api.waitForVideoResult(id, query, { interval: 100, timeout: 60_000, showSpinner: false });
const found = {
  created: created.data,
  ended: ended.data,
  byOwnId: (await query(body.external_task_id)).data.task_id,
  listed: (await api.httpClient.request("GET", path, { pageNum: 1, pageSize: 30 })).data.map((task) => task.task_id),
  account: (await api.getAccountInfo(Date.now() - 86_400_000, Date.now())).data,
  duplicate: await errorOf(() => api.httpClient.request("POST", path, body)),
  absent: await errorOf(() => query("nothing")),
  wrongShape: await errorOf(() => api.httpClient.request("POST", path, { ...body, mode: { a: 1 } })),
  unknownPath: await errorOf(() => api.textToVideo({ prompt: "a cat", model_name: "kling-v2-master", duration: "5" })),
  empty: (await api.httpClient.request("POST", path, { ...body, external_task_id: "" })).data.task_status,
};
console.log(JSON.stringify(found));
