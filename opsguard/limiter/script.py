"""The Lua script that decides in Redis: several charges of any strategy, all taken or none.

Redis runs a script alone, so what it reads cannot change before it writes, whoever else asks. All
reading comes before the first write: an error (a key of another type, a read-only replica, no
memory left) leaves nothing half taken.

Time is the server's own (`TIME`), in microseconds, so the clocks of the workers do not matter. That
clock may be set too. Forward, quotas come back early; back, nothing that was stored may lie further
ahead than one period, so nobody is refused longer than that: a bucket that needs such a mending
is written even if the decision is a refusal.

What is stored, by the letter after the prefix:

=====  ===========  ===========================================================================
``f``  fixed        a number; the window ends when the key expires
``s``  sliding      ``window current previous``: number of the window since the epoch, and counts
``g``  gcra         ``level time``: what is owed, in 1/period of a request, at that microsecond
``c``  concurrency  a sorted set: slot, and the microsecond at which it is free if nobody returns it
=====  ===========  ===========================================================================

Every key expires by itself once its quota is whole again. GCRA is kept as the leaky bucket that it
is equivalent to (ATM Forum, Traffic Management 4.1, §4.4.2): whole numbers, so that exactly the
burst is admitted, where a theoretical arrival time would be rounded.
"""

from __future__ import annotations

from hashlib import sha1

__all__ = ["DIGEST", "LONGEST", "TAKE"]

LONGEST = 3_000_000_000
"""Seconds that a period lasts at most in Redis, about a century; more would not fit its clock."""

TAKE = """\
-- KEYS: one for each charge.
-- ARGV: 'take' or 'give', then for each charge: letter of the strategy, amount, period in
-- microseconds, cost, burst, slot. To take answers {allowed, index, remaining, reset, wait}; the
-- index counts from 0, the times are microseconds. To give back answers 0.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local function milliseconds(microseconds)
  return string.format('%.0f', math.max(1, math.ceil(microseconds / 1000)))
end

local function put(key, text, microseconds)
  redis.call('SET', key, text, 'PX', milliseconds(microseconds))
end

-- A bucket knows its room: how many requests it has left. asked counts those of this decision.
local open = {}

open.f = function(key, amount, period)
  local used = tonumber(redis.call('GET', key) or 0) or 0
  local left = redis.call('PTTL', key) * 1000
  local mend = left > period
  if left < 0 then used, left = 0, period end
  if mend then left = period end
  return {
    room = amount - used,
    mend = mend,
    save = function(asked) put(key, string.format('%.0f', used + asked), left) end,
    reset = function(asked) return used + asked > 0 and left or 0 end,
    wait = function(asked) return left end,
    give = function(cost)
      if used > 0 then put(key, string.format('%.0f', math.max(0, used - cost)), left) end
    end,
  }
end

open.s = function(key, amount, period)
  local stored = redis.call('GET', key) or ''
  local window = math.floor(now / period)
  local elapsed = now - window * period
  local at, current, previous = string.match(stored, '^(%d+) (%d+) (%d+)$')
  at, current, previous = tonumber(at) or window, tonumber(current) or 0, tonumber(previous) or 0
  if at == window - 1 then
    current, previous = 0, current
  elseif at < window then
    current, previous = 0, 0
  end
  local function write(count)
    put(key, string.format('%.0f %.0f %.0f', window, count, previous), 2 * period - elapsed)
  end
  return {
    -- A millionth of a request, so that whoever waits as long as told is admitted.
    room = math.floor(amount - current - previous * (period - elapsed) / period + 1e-6),
    mend = at > window,
    save = function(asked) write(current + asked) end,
    reset = function(asked)
      if current + asked > 0 then return 2 * period - elapsed end
      return previous > 0 and period - elapsed or 0
    end,
    wait = function(asked)
      local spare = amount - asked - current
      if spare >= 0 then return period * (1 - spare / previous) - elapsed end
      spare = amount - asked
      return period - elapsed + math.max(0, period * (1 - spare / current))
    end,
    give = function(cost)
      if current > 0 then write(math.max(0, current - cost)) end
    end,
  }
end

open.g = function(key, amount, period, burst)
  local stored = redis.call('GET', key) or ''
  local level, at = string.match(stored, '^(%d+) (%d+)$')
  level, at = tonumber(level) or 0, tonumber(at) or now
  local most = burst * period
  local mend = at > now or level > most
  level = math.max(0, math.min(level, most) - math.max(0, now - at) * amount)
  local function write(sum) put(key, string.format('%.0f %.0f', sum, now), sum / amount) end
  return {
    room = math.floor((most - level) / period),
    mend = mend,
    save = function(asked) write(level + asked * period) end,
    reset = function(asked) return (level + asked * period) / amount end,
    wait = function(asked) return (level + asked * period - most) / amount end,
    give = function(cost)
      if level > 0 then write(math.max(0, level - cost * period)) end
    end,
  }
end

open.c = function(key, amount, period, burst, slot)
  local held = redis.call('ZCOUNT', key, string.format('(%.0f', now), '+inf')
  local last = now + period
  local late = redis.call('ZRANGEBYSCORE', key, string.format('(%.0f', last), '+inf')
  return {
    room = amount - held,
    mend = #late > 0,
    save = function(asked)
      for _, member in ipairs(late) do
        redis.call('ZADD', key, string.format('%.0f', last), member)
      end
      redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now))
      for number = 1, asked do
        redis.call('ZADD', key, string.format('%.0f', last), slot .. ':' .. number)
      end
      redis.call('PEXPIRE', key, milliseconds(period))
    end,
    reset = function(asked) return held + asked > 0 and period or 0 end,
    wait = function(asked) return math.min(period, 1000000) end,
    give = function(cost)
      for number = 1, cost do redis.call('ZREM', key, slot .. ':' .. number) end
    end,
  }
end

local buckets, order = {}, {}
for index, key in ipairs(KEYS) do
  local first = index * 6 - 4
  local amount, period = tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2])
  local bucket = buckets[key]
  if not bucket then
    local burst = tonumber(ARGV[first + 4])
    bucket = open[ARGV[first]](key, amount, period, burst, ARGV[first + 5])
    bucket.asked, bucket.period = 0, period
    bucket.most = ARGV[first] == 'g' and burst or amount
    buckets[key] = bucket
  end
  bucket.asked = bucket.asked + tonumber(ARGV[first + 3])
  order[index] = bucket
end

if ARGV[1] == 'give' then
  for _, bucket in pairs(buckets) do bucket.give(bucket.asked) end
  return 0
end

local allowed, decisive, longest = 1, nil, 0
for index, bucket in ipairs(order) do
  if bucket.asked > bucket.room then
    -- More than the whole quota is never admitted: any wait is as good as one period.
    local wait = bucket.period
    if bucket.asked <= bucket.most then wait = math.max(1, bucket.wait(bucket.asked)) end
    if wait > longest then allowed, decisive, longest = 0, index, wait end
  end
end

local tightest
for index, bucket in ipairs(order) do
  local left = bucket.room - bucket.asked
  if allowed == 1 and (not tightest or left < tightest) then decisive, tightest = index, left end
end

for _, bucket in pairs(buckets) do
  if allowed == 1 then
    bucket.save(bucket.asked)
  elseif bucket.mend then
    bucket.save(0)
  end
end

local bucket = order[decisive]
local asked = allowed == 1 and bucket.asked or 0
local left = math.max(0, bucket.room - asked)
return {allowed, decisive - 1, left, math.ceil(bucket.reset(asked)), math.ceil(longest)}
"""

DIGEST = sha1(TAKE.encode(), usedforsecurity=False).hexdigest()
"""What `EVALSHA` calls it by."""
