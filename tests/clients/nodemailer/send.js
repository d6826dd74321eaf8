// Sends one message, raw, by each of the ways that a JSON list on stdin describes.
import { readFileSync } from "node:fs";
import nodemailer from "nodemailer";

for (const { transport, sender, recipient, file } of JSON.parse(readFileSync(0, "utf8"))) {
  const mailer = nodemailer.createTransport(transport);
  await mailer.sendMail({ envelope: { from: sender, to: [recipient] }, raw: readFileSync(file) });
  mailer.close();
}
