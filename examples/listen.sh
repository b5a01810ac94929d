#!/bin/sh
# What everybody feels, a line an utterance: examples/listen.sh [-h HOST] [-p PORT]
# A message that is sent again after a broken connection is shown again.
mosquitto_sub "$@" -q 1 -t 'stream_hbaf/+/+/utterance' |
  jq --unbuffered -r 'select(.type == "end" and .emotion) | [.speaker, .emotion.label, .text] | @tsv'
