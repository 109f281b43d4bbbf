#!/bin/sh
# Keeps a service registered for as long as its command runs, and drains it before it ends the command.
#
#     GATEWAY=http://127.0.0.1:9901 examples/shell/service.sh hello http://127.0.0.1:8000 python3 -m http.server 8000
set -u
gateway=${GATEWAY:-http://127.0.0.1:9901}
service=$1 addr=$2
shift 2
instance=$gateway/services/$service/shell-$$

# api METHOD URL [BODY] fails unless the gateway answers with a success.
api() {
	curl -fsS -o /dev/null --max-time 40 -X "$1" "$2" \
		${KERBEROS_TOKEN:+-H "Authorization: Bearer $KERBEROS_TOKEN"} \
		${3:+-H "Content-Type: application/json" -d "$3"}
}

"$@" &
command=$!

# A lease of 5 s, renewed three times in that time; registered again where the gateway has forgotten it.
(
	until curl -s -o /dev/null "$addr"; do
		kill -0 "$command" 2>/dev/null || exit
		sleep 0.1
	done
	while kill -0 "$command" 2>/dev/null; do
		api POST "$instance/heartbeat" 2>/dev/null ||
			api PUT "$instance" "{\"addr\":\"$addr\",\"ttl\":\"5s\"}" && [ -z "${told:-}" ] && told=1 && echo registered
		sleep 1.6
	done
) &
keeper=$!

stop() {
	trap - TERM INT
	kill "$keeper"
	api DELETE "$instance?drain=30s" # returns when no request is under way any more
	kill "$command"
	wait "$command"
	exit 0
}
trap stop TERM INT
wait "$command"
