.PHONY: listen test check
listen:  ## set up and listen
	tools/listen
test:  ## set up and test
	tools/test
check:  ## format, lint, types, tests
	tools/check
