package datapath

// AttachWireGuard attaches the program that marks what comes out of a slot's WireGuard device, and lets nothing but VXLAN to this node's
// tunnel address of the slot come out of it. It is to be called for each device before it is used.
func (d *Datapath) AttachWireGuard(slot uint8, ifindex int) error { return nil }
