package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"
)

// Device is a TUN device, and the tun.Device of golang.zx2c4.com/wireguard that carries VXLAN. Its methods are safe for concurrent use.
type Device struct {
	name    string
	file    *os.File
	raw     syscall.RawConn
	link    *link
	offload offload
	mtu     atomic.Int64
	closed  atomic.Bool
	close   sync.Once
	counts  counts64

	read struct {
		sync.Mutex
		buffer   [headerSize + maxPacket]byte
		segments segments
	}
	write struct {
		sync.Mutex
		coalescer coalescer
		headers   []byte
		pieces    [][]byte
	}
}

var _ tun.Device = (*Device)(nil)

type counts64 struct{ malformed, oversized, refused atomic.Uint64 }

// Counts are of packets that went wrong since the device was made.
type Counts struct {
	Malformed uint64 // dropped: the kernel's description does not fit the packet
	Oversized uint64 // dropped: larger than the MTU
	Refused   uint64 // put together and not taken by the kernel, so written one by one
}

// Open makes a TUN device of the name and MTU (in bytes) in the network namespace of the calling thread, which must be an interface's of
// nobody yet. It is down. vxlanPort is the UDP port of VXLAN in packets that are put together. The device goes with Close, or
// with the process.
func Open(name string, mtu int, vxlanPort uint16) (*Device, error) {
	fd, err := attach(name)
	if err != nil {
		return nil, err
	}
	d := &Device{name: name, offload: negotiate(fd)}
	d.write.coalescer.port = vxlanPort
	// Non-blocking already, so that the runtime waits for it, and Close ends a Read.
	d.file = os.NewFile(uintptr(fd), clonePath)
	if d.raw, err = d.file.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening TUN device %s: %w", name, err), d.file.Close())
	}
	if d.link, err = watchLink(name, mtu, d.setMTU); err != nil {
		return nil, errors.Join(err, d.file.Close())
	}
	return d, nil
}

// File is the device's.
func (d *Device) File() *os.File { return d.file }

// Name is the one that the device was made with.
func (d *Device) Name() (string, error) { return d.name, nil }

// MTU is the device's at the moment, in bytes.
func (d *Device) MTU() (int, error) { return int(d.mtu.Load()), nil }

func (d *Device) setMTU(mtu int) { d.mtu.Store(int64(mtu)) }

// Events tells when the device is set up or down, or gets another MTU. It ends with Close.
func (d *Device) Events() <-chan tun.Event { return d.link.events }

// BatchSize is how many packets are read or written at once, at most.
func (d *Device) BatchSize() int { return conn.IdealBatchSize }

// Tunnels tells whether the kernel hands over and takes packets of VXLAN as large ones. Otherwise they cross one by one.
func (d *Device) Tunnels() bool { return d.offload.tunnel }

// Counts returns what went wrong since the device was made.
func (d *Device) Counts() Counts {
	return Counts{Malformed: d.counts.malformed.Load(), Oversized: d.counts.oversized.Load(), Refused: d.counts.refused.Load()}
}

// Close removes the device, and ends Read and Events.
func (d *Device) Close() (err error) {
	d.close.Do(func() {
		d.closed.Store(true)
		err = errors.Join(d.link.close(), d.file.Close())
	})
	return err
}

// Read reads at least one packet and at most as many as there are bufs, each from offset, and tells their sizes. Packets that are wrong are
// dropped and counted. After Close, and when the device was removed by somebody else, the error is os.ErrClosed.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	d.read.Lock()
	defer d.read.Unlock()
	s := &d.read.segments
	for !s.more() {
		if err := d.load(); err != nil {
			return 0, err
		}
	}
	n := 0
	for n < len(bufs) && s.more() {
		size := s.length()
		if len(bufs[n]) < offset+size {
			d.counts.oversized.Add(1)
			s.refuse(nil)
			break
		}
		s.take(bufs[n][offset:])
		sizes[n] = size
		n++
	}
	return n, nil
}

// load waits for a packet of the kernel. Afterwards there may be no segments all the same.
func (d *Device) load() error {
	n, err := d.file.Read(d.read.buffer[:])
	if err != nil {
		return d.failure(err)
	}
	if n < headerSize {
		d.counts.malformed.Add(1)
		return nil
	}
	err = d.read.segments.load(decodeHeader(d.read.buffer[:]), d.read.buffer[headerSize:n], int(d.mtu.Load()))
	if errors.Is(err, errTooLarge) {
		d.counts.oversized.Add(1)
	} else if err != nil {
		d.counts.malformed.Add(1)
	}
	return nil
}

// Write writes packets, each from offset in its buffer. Those that belong together reach the kernel as one. It returns how many were written, and what
// went wrong with the others.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	d.write.Lock()
	defer d.write.Unlock()
	defer d.write.coalescer.reset()
	d.gather(bufs, offset)
	written, errs := 0, error(nil)
	for i := range d.write.coalescer.groups {
		n, err := d.writeGroup(&d.write.coalescer.groups[i])
		written += n
		if errors.Is(err, os.ErrClosed) {
			return written, err
		}
		errs = errors.Join(errs, err)
	}
	return written, errs
}

// gather puts together what can be.
func (d *Device) gather(bufs [][]byte, offset int) {
	c := &d.write.coalescer
	for _, b := range bufs {
		if d.offload.tunnel {
			c.add(b[offset:])
		} else {
			c.begin(wire{packet: b[offset:]})
		}
	}
}

// writeGroup writes the packets of a group as one, or one by one if the kernel does not take them so.
func (d *Device) writeGroup(g *group) (int, error) {
	if len(g.packets) == 1 {
		return d.writeAlone(g.packets[0])
	}
	d.write.headers = g.build(d.write.headers[:0])
	d.offload.adapt(d.write.headers)
	pieces := append(d.write.pieces[:0], d.write.headers)
	for _, p := range g.packets {
		pieces = append(pieces, p[g.first.headers:])
	}
	d.write.pieces = pieces
	err := d.writev(pieces)
	clear(pieces)
	if !errors.Is(err, unix.EINVAL) {
		if err != nil {
			return 0, err
		}
		return len(g.packets), nil
	}
	d.counts.refused.Add(1)
	written, errs := 0, error(nil)
	for _, p := range g.packets {
		n, err := d.writeAlone(p)
		written += n
		errs = errors.Join(errs, err)
	}
	return written, errs
}

// writeAlone writes a packet as it is.
func (d *Device) writeAlone(packet []byte) (int, error) {
	d.write.headers = append(d.write.headers[:0], make([]byte, headerSize)...)
	d.write.pieces = append(d.write.pieces[:0], d.write.headers, packet)
	if err := d.writev(d.write.pieces); err != nil {
		return 0, err
	}
	return 1, nil
}

func (d *Device) writev(pieces [][]byte) error {
	var failed error
	err := d.raw.Write(func(fd uintptr) bool {
		for {
			if _, failed = unix.Writev(int(fd), pieces); failed != unix.EINTR {
				break
			}
		}
		return failed != unix.EAGAIN
	})
	if err == nil {
		err = failed
	}
	if err == nil {
		return nil
	}
	return d.failure(fmt.Errorf("writing to TUN device %s: %w", d.name, err))
}

// failure makes the error of a device that is gone os.ErrClosed.
func (d *Device) failure(err error) error {
	if d.closed.Load() || errors.Is(err, unix.EBADFD) || errors.Is(err, os.ErrClosed) {
		return os.ErrClosed
	}
	return err
}
