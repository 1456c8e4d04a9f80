// Package tunnel makes the way between nodes: the VXLAN device, the routes by
// which a node's own processes reach remote pods, and the MTU that
// leaves room for the tunnel's headers.
//
// Packets of pods don't use the routes: the programs of package datapath send them to the device.
//
// Everything acts on the network namespace of the calling thread.
package tunnel
