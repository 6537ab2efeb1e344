-- Posts files in turn and prints what came of it as one line of JSON. Arguments: media type, path, files.
local requests, turn = {}, 0

function init(args)
   local headers = { ["Content-Type"] = args[1] }
   for index = 3, #args do
      local file = assert(io.open(args[index], "rb"))
      requests[index - 2] = wrk.format("POST", args[2], headers, file:read("*a"))
      file:close()
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency)
   local errors = summary.errors
   local failures = errors.status + errors.connect + errors.read + errors.write + errors.timeout
   local percentiles = { p50_ms = 50, p75_ms = 75, p90_ms = 90, p95_ms = 95, p99_ms = 99, p99_9_ms = 99.9 }
   local fields = {}
   for name, percentile in pairs(percentiles) do
      fields[#fields + 1] = string.format('"%s": %f', name, latency:percentile(percentile) / 1e3)
   end
   io.write(string.format('\n{"requests": %d, "seconds": %f, "failures": %d, %s}\n',
      summary.requests, summary.duration / 1e6, failures, table.concat(fields, ", ")))
end
