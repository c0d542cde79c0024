// Verifies the webhook signature of one delivery as a consumer does, with the npm package `standardwebhooks`.
// Reads {secret, body, headers} as JSON from standard input.
import { readFileSync } from "node:fs";
import { Webhook } from "standardwebhooks";

const { secret, body, headers } = JSON.parse(readFileSync(0, "utf8"));
new Webhook(secret).verify(body, headers);
console.log("verified");
