// Package tun is a TUN device for golang.zx2c4.com/wireguard that carries VXLAN.
//
// The device that comes with that module takes large packets of plain TCP and UDP from the kernel and splits them itself, and puts
// what it receives together again, so that the way through the kernel is walked once for some forty packets of the wire. Of VXLAN it knows
// nothing: the kernel has to split before the device, and each packet crosses alone, at about a third of the throughput. This device
// asks for packets of UDP tunnels too (Linux 6.17), splits what is inside of them, and puts packets of VXLAN together.
//
// What it does besides is as little as possible: packets that are not plain TCP or UDP in VXLAN pass as they are.
package tun
