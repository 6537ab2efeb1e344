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
   io.write(string.format('\n{"requests": %d, "seconds": %f, "failures": %d, "p50_ms": %f, "p99_ms": %f}\n',
      summary.requests, summary.duration / 1e6, failures,
      latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
