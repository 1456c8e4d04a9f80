package testbed

import (
	"fmt"
	"strconv"
	"strings"

	"causeway/lb"
)

// Port is one of a protocol, written udp/7956. The zero Port means all packets.
type Port struct {
	Protocol lb.Protocol
	Number   uint16
}

// ParsePort reads udp/NUMBER or tcp/NUMBER.
func ParsePort(s string) (Port, error) {
	protocol, number, ok := strings.Cut(s, "/")
	n, err := strconv.ParseUint(number, 10, 16)
	p := Port{Protocol: lb.Protocol(strings.ToUpper(protocol)), Number: uint16(n)}
	if !ok || err != nil || n == 0 || p.Protocol != lb.TCP && p.Protocol != lb.UDP {
		return Port{}, fmt.Errorf("%q is no port; write udp/NUMBER or tcp/NUMBER, like udp/7956", s)
	}
	return p, nil
}

func (p Port) String() string {
	if p == (Port{}) {
		return ""
	}
	return fmt.Sprintf("%s/%d", strings.ToLower(string(p.Protocol)), p.Number)
}

// MarshalText writes it as String does.
func (p Port) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is ParsePort, with nothing for the zero Port.
func (p *Port) UnmarshalText(text []byte) (err error) {
	*p = Port{}
	if len(text) > 0 {
		*p, err = ParsePort(string(text))
	}
	return err
}

// Set and Type make it a flag's value.
func (p *Port) Set(s string) error { return p.UnmarshalText([]byte(s)) }
func (p *Port) Type() string       { return "udp/NUMBER" }
