package datapath

import "errors"

// l7 tells whether the frontend's connections are the proxy's.
func (f bpfFrontend) l7() bool { return f.Flags&uint8(bpfFrontendFlagFRONTEND_L7) != 0 }

func (k bpfFrontendKey) l7Address() bpfL7AddressKey {
	return bpfL7AddressKey{Address: k.Address, Cluster: k.Cluster}
}

// countL7 counts a frontend that was or is one of L7. Its address is the proxy's no longer when it was the last one there. An error
// leaves the address with the proxy, which refuses what it has no frontend for.
func (b *balancer) countL7(key frontendID, was, is bool) error {
	switch {
	case is && !was:
		b.l7[key.l7Address()]++
	case was && !is:
		b.l7[key.l7Address()]--
		return b.releaseL7(key)
	}
	return nil
}

// releaseL7 takes the address of a frontend from the proxy if no L7 frontend has it.
func (b *balancer) releaseL7(key frontendID) error {
	address := key.l7Address()
	if b.l7[address] > 0 {
		return nil
	}
	delete(b.l7, address)
	return b.maps.l7Addresses.del(address)
}

// restoreL7 makes the addresses of L7 frontends those of the frontends that are in the kernel.
func (b *balancer) restoreL7() error {
	for key, value := range b.frontends {
		if value.l7() {
			b.l7[key.l7Address()]++
		}
	}
	var err error
	var stale []bpfL7AddressKey
	for address := range b.maps.l7Addresses.all(&err) {
		if b.l7[address] == 0 {
			stale = append(stale, address)
		}
	}
	errs := []error{err}
	for _, address := range stale {
		errs = append(errs, b.maps.l7Addresses.del(address))
	}
	for address := range b.l7 {
		errs = append(errs, b.maps.l7Addresses.put(address, 1))
	}
	return errors.Join(errs...)
}
