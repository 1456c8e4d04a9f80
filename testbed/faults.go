package testbed

import "errors"

// loadFaults opens the program that loses packets on the underlay.
func loadFaults(string) (faults, error) {
	return nil, errors.New("this build cannot lose packets on the underlay yet")
}
