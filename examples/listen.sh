#!/bin/sh
# Prints speaker, emotion and words of each utterance: examples/listen.sh [-h HOST] [-p PORT]
# Repeated messages (after a broken connection) are printed again.
mosquitto_sub "$@" -q 1 -t 'stream_hbaf/+/+/utterance' |
  jq --unbuffered -r 'select(.type == "end" and .emotion) | [.speaker, .emotion.label, .text] | @tsv'
