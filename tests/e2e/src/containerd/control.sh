#!/bin/sh
# Starts, stops and restarts one private containerd: control start|stop|restart. What systemd does on a host, and like it
# (the unit is of type notify) it comes back only when containerd listens, or fails with the end of its log.
set -eu
cd "$(dirname "$0")"
. ./environment # path, containerd, log_level

alive() { [ -e pid ] && kill -0 "$(cat pid)" 2>/dev/null; }

stop() {
  alive || return 0
  kill -TERM "$(cat pid)"
  tries=0
  while alive; do
    tries=$((tries + 1))
    [ "$tries" -lt 500 ] || { echo "containerd did not end within 10 s of SIGTERM" >&2; exit 1; }
    sleep 0.02
  done
}

start() {
  # A test makes this file to have a containerd that does not come back.
  [ ! -e refuse-to-start ] || { echo "containerd does not start: $(cat refuse-to-start)" >&2; exit 1; }
  rm -f containerd.sock
  env -i HOME=/root PATH="$path" setsid "$containerd" --config "$PWD/etc/config.toml" --log-level "$log_level" \
    >>log 2>&1 </dev/null &
  echo $! >pid
  tries=0
  while [ ! -S containerd.sock ]; do
    tries=$((tries + 1))
    alive || { echo "containerd ended as soon as it was started:" >&2; tail -n 5 log >&2; exit 1; }
    [ "$tries" -lt 1000 ] || { echo "containerd does not listen after 20 s" >&2; exit 1; }
    sleep 0.02
  done
}

case ${1:-} in
start) start ;;
stop) stop ;;
restart) echo restart >>restarts; stop; start ;;
*) echo "usage: $0 start|stop|restart" >&2; exit 2 ;;
esac
