// Verify the DKIM signature of every file of a directory: node verify.mjs DIRECTORY RECORD
// The record is what the DNS would say; prints JSON, {file: result}.
import { readFileSync, readdirSync } from 'node:fs';
import { dkimVerify } from 'mailauth/lib/dkim/verify.js';

const [directory, record] = process.argv.slice(2);
const resolver = async () => [[record]];
const results = {};
for (const name of readdirSync(directory)) {
  const { results: found } = await dkimVerify(readFileSync(`${directory}/${name}`), { resolver });
  const ours = found.find((one) => one.signingDomain === 'corpus.example');
  results[name] = ours ? ours.status.result : 'none';
}
console.log(JSON.stringify(results));
